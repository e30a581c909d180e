"""`adamerge export RUN`: a merged classifier as a plain checkpoint of its library."""

from adamerge.checkpoints import loading_code, local_path
from adamerge.errors import InputError
from adamerge.mixture import export_classifier
from adamerge.progress import print_line


def export(model: str, *, out: str | None = None, task: str | None = None, overwrite: bool = False) -> int:
    """Write a merged classifier as a plain checkpoint of transformers or timm, with a task's head put in.

    The folder says what its rows mean (id2label, label2id; timm: label_names) and has the processor or
    tokenizer beside it: transformers' pipeline uses it as it is.

    Args:
        model: A run folder, its merged model, or a folder that `adamerge merge` wrote of classifiers.
        out: The folder to write.
        task: Whose head is put in; "all": one classifier over the classes of all tasks, which are named
            TASK: CLASS where several tasks have a class of the same name. Default: the only task.
        overwrite: Replace the output if it exists.
    """
    if out is None:
        raise InputError("no output was named.", "Pass --out DIR.")
    target = export_classifier(local_path(model, "model"), out, task, overwrite=overwrite)
    print_line(f"The classifier is {target}. Load it: {loading_code(target)}")
    return 0
