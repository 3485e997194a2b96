"Ctrl-C while `attention_sites` looks at a model: no hook is left, whichever line it comes at"
import sys

import pytest
from torch import nn

from fastai_selfattn.placement import trace as module
from fastai_selfattn.placement.sites import attention_sites

def hooks(model):
    return [h for m in model.modules() for d in (m._forward_hooks, m._forward_pre_hooks, m._forward_pre_hooks_with_kwargs) for h in d]

class CtrlC:
    "Raises KeyboardInterrupt at line number `at` of those that run in the room's module `trace`"
    def __init__(self, at): self.left,self.where = at,None
    def __call__(self, frame, event, arg):
        if frame.f_code.co_filename != module.__file__: return None
        return self.line
    def line(self, frame, event, arg):
        if event != 'line' or self.where: return self.line
        self.left -= 1
        if self.left: return self.line
        self.where = f'{frame.f_code.co_name}:{frame.f_lineno-frame.f_code.co_firstlineno}'
        raise KeyboardInterrupt

def test_no_hook_is_left_at_any_line():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    left,at = {},0
    while True:
        at += 1
        ctrl_c,before = CtrlC(at),sys.gettrace()
        sys.settrace(ctrl_c)
        try: attention_sites(model, (9, 12))
        except KeyboardInterrupt: pass
        finally: sys.settrace(before)
        if not ctrl_c.where: break     # the look was over before
        if hooks(model): left[ctrl_c.where] = len(hooks(model))
        for m in model.modules():
            for d in (m._forward_hooks, m._forward_pre_hooks, m._forward_pre_hooks_with_kwargs): d.clear()
    assert at > 40 and set(left) <= {'trace:19', '_without:2'}, left     # `finally`, and `try` in it: Python has nothing to put around these

def test_ctrl_c_in_the_model_goes_through():
    def stop(*args): raise KeyboardInterrupt
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    handle = model[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt): attention_sites(model, (9, 12))
    handle.remove()
    assert not hooks(model) and attention_sites(model, (9, 12))['1'].channels == 8
