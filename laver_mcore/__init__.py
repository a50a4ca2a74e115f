"""Megatron-style training of vision-language models whose visual tokens have their own supervision (LaVer)."""

import sys
import types

__version__ = "0.1.0"


def _start_without_the_compiler() -> None:
    """Let Megatron-Core be imported without loading torch's compiler, which takes seconds in every process.

    Its module of this name wraps fused elementwise functions in `torch.compile` at import. This engine's layers use
    none of them (`layer_spec.transformer_config` turns the fusions off), so here they stay as written.
    """
    jit = types.ModuleType("megatron.core.jit")
    jit.jit_fuser = jit.noop_decorator = lambda function: function  # type: ignore[attr-defined]
    sys.modules.setdefault("megatron.core.jit", jit)


_start_without_the_compiler()
