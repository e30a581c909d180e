"""Tables of methods on benchmarks: the CLIP-ViT ones as data, their gate, and the published rows."""

from adamerge.benchmarks.clip import Definition, define, defined
from adamerge.benchmarks.files import copy_folder, method_file, method_name, read_benchmark
from adamerge.benchmarks.gate import Premises
from adamerge.benchmarks.measuring import expert_statistics
from adamerge.benchmarks.opened import oracles
from adamerge.benchmarks.published import published_rows
from adamerge.benchmarks.run import Benchmark
from adamerge.shipped import configs

__all__ = [
    "Benchmark",
    "Definition",
    "Premises",
    "configs",
    "copy_folder",
    "define",
    "defined",
    "expert_statistics",
    "method_file",
    "method_name",
    "oracles",
    "published_rows",
    "read_benchmark",
]
