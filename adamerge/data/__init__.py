"""Tasks, their images and the batches that adaptation and evaluation see."""
