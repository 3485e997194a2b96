"Everything a notebook needs: `from fastai_selfattn.all import *`, after `from fastai.vision.all import *`"
from fastai_selfattn import learner  # noqa: F401  gives `Learner` its methods
from fastai_selfattn.attention.kinds import attention_layers, attention_off, attention_status, register_attention
from fastai_selfattn.attention.layers import PaperSelfAttention, PooledSelfAttention2d, SelfAttention, SimpleSelfAttention, fuse_attention
from fastai_selfattn.attention.ops import attend, attention_backend, attention_stats, attention_weights, dot_attend, which_backend
from fastai_selfattn.compare.compare import compare_attention
from fastai_selfattn.compare.results import Comparison
from fastai_selfattn.export import to_onnx, to_program, to_torchscript
from fastai_selfattn.large import predict_large
from fastai_selfattn.placement.compiled import compile_unet
from fastai_selfattn.placement.insert import insert_attention, remove_attention
from fastai_selfattn.placement.keep import load_attention, save_attention
from fastai_selfattn.placement.optim import inserted_layers
from fastai_selfattn.placement.sites import attention_sites
from fastai_selfattn.placement.unet import create_unet_model, unet_learner
from fastai_selfattn.placement.upgrade import upgrade_attention
from fastai_selfattn.seeing.chart import plot_attention_stats, plot_gamma, plot_sites
from fastai_selfattn.seeing.effect import attention_effect, attention_uniform
from fastai_selfattn.seeing.explorer import attention_explorer
from fastai_selfattn.seeing.field import receptive_field
from fastai_selfattn.seeing.gamma_logger import GammaLogger
from fastai_selfattn.seeing.interpret import AttentionInterpretation
from fastai_selfattn.seeing.map_logger import AttentionMapLogger
from fastai_selfattn.seeing.plot import plot_attention, show_attention, show_attention_growth, show_receptive_field
from fastai_selfattn.seeing.record import AttentionRecorder
from fastai_selfattn.tell import tell

__all__ = ['attend', 'attention_backend', 'attention_stats', 'attention_weights', 'dot_attend', 'which_backend',
           'SelfAttention', 'PooledSelfAttention2d', 'PaperSelfAttention', 'SimpleSelfAttention', 'fuse_attention',
           'register_attention', 'attention_layers', 'attention_status', 'attention_off', 'attention_uniform', 'attention_effect',
           'attention_sites', 'insert_attention', 'inserted_layers', 'remove_attention', 'upgrade_attention', 'save_attention',
           'load_attention',
           'create_unet_model', 'unet_learner', 'compile_unet',
           'compare_attention', 'Comparison', 'to_onnx', 'to_program', 'to_torchscript', 'predict_large',
           'AttentionRecorder', 'receptive_field', 'GammaLogger', 'AttentionMapLogger', 'AttentionInterpretation', 'attention_explorer',
           'plot_attention', 'plot_attention_stats', 'plot_gamma', 'plot_sites',
           'show_attention', 'show_attention_growth', 'show_receptive_field']

tell(*(globals()[name] for name in __all__), *learner.methods())
