"""Zero-shot tasks by log-likelihood: `evaluate_task(model, params, tokenizer, "piqa")`; `TASKS` lists them."""

from fbi.evaluate.tasks.metrics import TaskScore as TaskScore
from fbi.evaluate.tasks.tasks import TASKS as TASKS
from fbi.evaluate.tasks.tasks import evaluate_task as evaluate_task
