"""RLHF for language models as pure functions in JAX.

    supervised fine-tuning -> reward model -> PPO -> evaluate

In a notebook, from the folder of a run to texts:

    import rlhf_jax

    model = rlhf_jax.load("runs/demo")
    texts = model.generate(["SUBREDDIT: r/advice ...TL;DR:"])

Array names end in one letter an axis (Shazeer suffixes); a scalar or a pytree has none. A digit is an axis of that
size:

    A  attention heads of keys and values: H, or fewer where several heads of queries read each
    B  rows of a batch
    C  candidates: the ids that a model finds most likely
    D  width of the model
    E  epochs over a rollout
    F  width of the feed-forward layer
    G  rows of a group that enters the lanes of a queue together
    H  attention heads
    J  planes in which a rotary position turns a head
    K  entries of a head
    M  models that read the same tokens
    N  rows of a data set or a table, prompts of a queue
    O  outputs: the completions of one prompt, a group
    P  columns of the prompts
    Q  questions: the prompts of a batch, each with O completions
    R  columns of the responses
    S  slots of the KV cache: the tokens that a query attends to
    T  tokens of a sequence: P + R where a prompt and a response are side by side
    U  tokens selected from T
    V  ids of the vocabulary
    W  columns of the prompts that are left when shared padding is cut off
    X  any token axes: B and T, T alone, ...

Prompts are left-padded and responses right-padded, so every prompt ends at column P - 1 and the response is
always the last R columns. Entry i of a `_BR` array belongs to response token i; `values_BR[b, i]` is the value
*before* it. `mask_BR` is 1 on response tokens, EOS included, and 0 after.
"""

TYPE_CHECKING = False  # type checkers take it as True; importing the name would cost a command milliseconds

if TYPE_CHECKING:
    from rlhf_jax.pretrained import load
    from rlhf_jax.training.fit import fit

__all__ = ["__version__", "fit", "load"]

# Imported on first use, as JAX takes a second.
_HOME = {"fit": "rlhf_jax.training.fit", "load": "rlhf_jax.pretrained"}


def __getattr__(name: str):
    if name == "__version__":
        from importlib import metadata

        try:
            return metadata.version(__name__)
        except metadata.PackageNotFoundError:
            return "0+unknown"  # a clone on the path that is not installed
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
