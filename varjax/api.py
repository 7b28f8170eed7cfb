"""The public names of `varjax`, listed once: `varjax.load` is the `load` of this module."""

from varjax.mar.model import MARConfig as MARConfig
from varjax.mar.pipeline import MARPipeline as MARPipeline
from varjax.mar.sample import MAROptions as MAROptions
from varjax.models import load as load
from varjax.models import load_tokenizer as load_tokenizer
from varjax.nn.compute import ComputeConfig as ComputeConfig
from varjax.sampling.paste import paste as paste
from varjax.storage.image_io import read_image as read_image
from varjax.tokenizers.kl.model import KLConfig as KLConfig
from varjax.tokenizers.vq.model import VQConfig as VQConfig
from varjax.tokenizers.vq.pyramid import SCALES_256 as SCALES_256
from varjax.tokenizers.vq.pyramid import SCALES_512 as SCALES_512
from varjax.tokenizers.vq.pyramid import SCALES_1024 as SCALES_1024
from varjax.var.model import VARConfig as VARConfig
from varjax.var.pipeline import VARPipeline as VARPipeline
from varjax.var.sample import VAROptions as VAROptions
