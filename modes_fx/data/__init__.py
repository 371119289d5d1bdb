"""Data sets and models, from files or the Hub, as calibration and evaluation take them.

chat       questions, pictures and answers through the model's own chat template
rows       rows of data sets, and what their cells hold
loading    models and their processors
"""

from modes_fx.data.chat import ChatBatches as ChatBatches
from modes_fx.data.chat import Columns as Columns
from modes_fx.data.rows import PictureTable as PictureTable
from modes_fx.data.rows import load_rows as load_rows
