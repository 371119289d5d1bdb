"""Benchmarks that people know, on a model that skips: lmms-eval for pictures, lm-eval for text.

modes-fx evaluate MODEL --profile PROFILE --tasks gqa,pope
python -m lmms_eval --model modes_fx --model_args pretrained=MODEL,profile=PROFILE --tasks gqa,pope
modes-fx evaluate MODEL --profile PROFILE --tasks hellaswag --harness lm-eval
"""

from modes_fx.evaluation.run import Evaluation as Evaluation
from modes_fx.evaluation.run import evaluate as evaluate
