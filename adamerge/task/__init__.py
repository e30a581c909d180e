"""MergeTask, the only LightningModule: the parts of a merged model, its evaluation, its adaptation."""

from adamerge.task.adapting import MergeTask, published_adam

__all__ = ["MergeTask", "published_adam"]
