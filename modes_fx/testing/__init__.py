"""Tiny models with random weights, inputs and profiles for them: for tests, and to see what compiles."""

from modes_fx.testing.families import FAMILIES as FAMILIES
from modes_fx.testing.families import Family as Family
from modes_fx.testing.families import set_experts as set_experts
from modes_fx.testing.profiles import tiny_profile as tiny_profile
from modes_fx.testing.qwen3_vl_moe import tiny_inputs as tiny_inputs
from modes_fx.testing.qwen3_vl_moe import tiny_qwen3_vl_moe as tiny_qwen3_vl_moe
from modes_fx.testing.tokens import AUDIO as AUDIO
from modes_fx.testing.tokens import BOS as BOS
from modes_fx.testing.tokens import EOS as EOS
from modes_fx.testing.tokens import IMAGE as IMAGE
from modes_fx.testing.tokens import PAD as PAD
from modes_fx.testing.tokens import SPECIAL as SPECIAL
from modes_fx.testing.tokens import VIDEO as VIDEO
from modes_fx.testing.tokens import VISION_END as VISION_END
from modes_fx.testing.tokens import VISION_START as VISION_START
from modes_fx.testing.tokens import VOCABULARY as VOCABULARY
