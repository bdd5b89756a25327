"""Statistics for merging models with `mats-stream`: Grams and Fishers of any `nn.Module`.

```python
from mats_stream import collect

statistics = collect(model, batches, "causal-lm", kinds=["input_gram", "output_gram"])
statistics.save("stats.safetensors")
```

[`collect`] says what can be asked for. From a shell: `mats-stream-collect --help`.
"""

from .collector import collect
from .errors import CollectError
from .kinds import FORMAT, KINDS
from .likelihood import CausalLM, Classification, Sampler, Seq2Seq, log_likelihood
from .statistics import Statistics

__version__ = "0.1.0"

__all__ = [
    "FORMAT",
    "KINDS",
    "CausalLM",
    "Classification",
    "CollectError",
    "Sampler",
    "Seq2Seq",
    "Statistics",
    "collect",
    "log_likelihood",
]
