"What `help()` says: each parameter of each public name, and of the methods of `Learner`"
import inspect
import pydoc

import pytest
from fastai.learner import Learner

import fastai_selfattn.all as everything
from fastai_selfattn import learner
from fastai_selfattn.tell import tell

def told(f): return inspect.getdoc(f) or ''

def parameters(f):
    "Names that the source of `f` has, and not those that `delegates` shows for `**kwargs`"
    code = inspect.unwrap(f).__code__
    n = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return [p for p in code.co_varnames[:n] if p not in ('self', 'cls')]

def functions():
    for name in everything.__all__:
        thing = getattr(everything, name)
        if not inspect.isclass(thing): yield name, thing, thing
        else:
            if inspect.isfunction(thing.__init__) and thing.__init__.__module__.startswith('fastai_selfattn'): yield name, thing, thing.__init__
            for method, m in vars(thing).items():
                m = getattr(m, '__func__', m)
                if not method.startswith('_') and inspect.isfunction(m) and not (issubclass(thing, everything.GammaLogger.__mro__[1]) and method.startswith(('before_', 'after_'))): yield f'{name}.{method}', m, m
    for m in learner.methods(): yield f'Learner.{m.__name__}', m, m

FUNCTIONS = {name: (thing, f) for name, thing, f in functions()}

@pytest.mark.parametrize('name', FUNCTIONS)
def test_help_says_what_each_parameter_means(name):
    thing, f = FUNCTIONS[name]
    missing = [p for p in parameters(f) if not any(line.strip().lstrip('*').startswith(f'{p}: ') for line in told(thing).splitlines())]
    if name.partition('.')[2] == 'forward': return               # called by PyTorch, not by people
    assert not missing and told(thing).splitlines()[0] and 'fastai_selfattn' not in told(thing).splitlines()[0]

def test_all_public_names_are_looked_at():
    assert len(FUNCTIONS) > 50 and {'show_attention', 'AttentionRecorder', 'Learner.show_attention', 'AttentionInterpretation.plot_top', 'unet_learner', 'attention_off'} <= FUNCTIONS.keys()
    assert 'head: maps of this head, counted from 0; the mean of the heads if None' in pydoc.render_doc(Learner.show_attention)
    assert told(everything.show_attention).count('Parameters:') == 1 and told(everything.show_attention).splitlines()[-1].startswith('Returns: a row of axes')

def test_what_is_written_how_is_read():
    def f(a:int, # one
        b='# not', # two # parts
        *args, # three
        c:dict[str,int]=None, # four: with a colon
        **kwargs # five
    )->int: # six
        "F"
    tell(f)
    assert told(f) == 'F\n\nParameters:\n  a: one\n  b: two # parts\n  *args: three\n  c: four: with a colon\n  **kwargs: five\nReturns: six'
    def g(a, b=1): return a # nothing
    tell(g)
    assert g.__doc__ is None
    class C:
        "C"
        def __init__(self,
            a:int, # in metres
        ): self.a = a
        def other(self,
            b:int, # in seconds
        )->int: # nothing
            "O"
    tell(C)
    assert C.__doc__ == 'C\n\nParameters:\n  a: in metres' and C.other.__doc__ == 'O\n\nParameters:\n  b: in seconds\nReturns: nothing'
    class Empty(int): "Empty"
    tell(Empty)
    assert Empty.__doc__ == 'Empty'
