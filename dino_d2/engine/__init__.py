"""Training and evaluation, from either style of config."""

from .default_trainer import DefaultTrainer
from .ema import EMA
from .hooks import BestCheckpointer, EvalHook
from .plan import Plan, make_plan
from .run import evaluate, test, train
from .schedule import scale_schedule
from .trainer import NonFiniteLoss, Trainer
