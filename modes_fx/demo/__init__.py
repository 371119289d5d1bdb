"""A small trained Qwen3-VL-MoE and a 13-task suite of questions about real pictures, both in this package.

    model, processor = demo.load()
    demo.accuracy(model, demo.batches("test", 130))

Importing this module imports neither torch nor transformers; the first call does.
"""

from modes_fx.demo.model import load as load
from modes_fx.demo.pictures import ASSETS as ASSETS
from modes_fx.demo.suite import Batch as Batch
from modes_fx.demo.suite import accuracy as accuracy
from modes_fx.demo.suite import batches as batches
from modes_fx.demo.suite import question as question
from modes_fx.demo.words import TASKS as TASKS
