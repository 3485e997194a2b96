"What `GammaLogger` says in words; how it logs is tested beside the other logger."
import pandas as pd
import pytest

from fastai_selfattn.all import GammaLogger


def test_in_words_says_what_the_last_epoch_did():
    logger = GammaLogger()
    with pytest.raises(ValueError, match='train first'): logger.in_words
    rows = [dict(step=0, epoch=0., gamma=0.), dict(step=1, epoch=.5, gamma=.5, change=.5), dict(step=2, epoch=1., gamma=.4, change=.5),
            dict(step=3, epoch=1.5, gamma=.013, change=.004), dict(step=4, epoch=2., gamma=-.0131, change=.006)]
    assert GammaLogger(history=pd.DataFrame(rows)).in_words == {'': 'gamma -0.0131: attention does nothing here: it changes the features by 0.5%'}
    two = [dict(step=0, epoch=0., gamma_a=1., gamma_b=0.), dict(step=1, epoch=1., gamma_a=1.04, gamma_b=0., change_a=.3, change_b=0., change_c=.1)]
    assert GammaLogger(history=pd.DataFrame(two)).in_words == {'a': 'gamma 1.04: attention changes the features by 30%', 'c': 'attention changes the features by 10%',
        'b': 'gamma 0: attention does nothing here: it changes the features by 0.0%'}

def test_a_layer_may_have_change_in_its_name():
    rows = [dict(step=0, epoch=0., gamma_exchange=.5, change_exchange=.3, gamma_other=.2, change_other=.1)]
    assert {k: v.split(':')[0] for k, v in GammaLogger(history=pd.DataFrame(rows)).in_words.items()} == {'exchange': 'gamma 0.5', 'other': 'gamma 0.2'}

def test_layers_that_are_gone_or_renamed_say_nothing():
    "A single layer is called '', two by their names; what was not logged in the last epoch is not there"
    rows = [dict(step=0, epoch=0., gamma=.5, change=.5), dict(step=1, epoch=1., gamma_a=.2, change_a=.1, gamma_b=.3, change_b=.2)]
    assert list(GammaLogger(history=pd.DataFrame(rows)).in_words) == ['a', 'b']
    rows += [dict(step=2, epoch=2., gamma=.2, change=.1), dict(step=3, epoch=3., gamma=.1, change=.1)]
    assert list(GammaLogger(history=pd.DataFrame(rows)).in_words) == ['']
    logger = GammaLogger(history=pd.DataFrame(rows))
    logger._rows.append(dict(step=4, epoch=4.1, gamma=float('nan'), change=float('nan')))     # of a model that diverged
    assert list(logger.in_words) == [''] and 'nan' in logger.in_words['']

@pytest.mark.parametrize('step,epoch,says', [(['a'], [1], "number as `step`.*got 'a'"), ([0, float('nan')], [0, 1], '`step` in every row, got .*nan'), ([1, 2], [0, float('inf')], '`epoch` in every row, got .*inf'),
    ([1, 3, 2], [0, 1, 2], 'in the order of its steps, and its `step` goes down'), ([1, 2], [1., .5], 'its `epoch` goes down')], ids=range(5))
def test_a_history_that_cannot_be_gone_on_with_is_refused(step, epoch, says):
    with pytest.raises(ValueError, match=says): GammaLogger(history=pd.DataFrame({'step': step, 'epoch': epoch}))

def test_a_history_is_gone_on_with():
    known = pd.DataFrame({'step': [0, 1], 'epoch': [0, .5], 'gamma': [0, None]})
    assert len(GammaLogger(history=known).history) == 2 and len(GammaLogger(history=known[:0]).history) == 0
