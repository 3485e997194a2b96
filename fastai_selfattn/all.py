"Everything a notebook needs: `from fastai_selfattn.all import *`, after `from fastai.vision.all import *`"
from fastai_selfattn import learner  # noqa: F401  gives `Learner` its methods
from fastai_selfattn.callbacks import GammaLogger
from fastai_selfattn.insert import insert_attention, inserted_layers, remove_attention
from fastai_selfattn.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention, fuse_attention
from fastai_selfattn.ops import attend, attention_backend, attention_weights, dot_attend
from fastai_selfattn.plot import plot_attention, plot_gamma, plot_sites
from fastai_selfattn.record import AttentionRecorder, attention_layers
from fastai_selfattn.sites import attention_sites
from fastai_selfattn.unet import create_unet_model, unet_learner
from fastai_selfattn.upgrade import upgrade_attention

__all__ = ['attend', 'attention_backend', 'attention_weights', 'dot_attend', 'SelfAttention', 'PooledSelfAttention2d',
           'PaperSelfAttention', 'SimpleSelfAttention', 'fuse_attention', 'attention_sites', 'insert_attention', 'inserted_layers',
           'remove_attention', 'upgrade_attention', 'create_unet_model', 'unet_learner', 'AttentionRecorder', 'attention_layers',
           'plot_attention', 'plot_gamma', 'plot_sites', 'GammaLogger']
