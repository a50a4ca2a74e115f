"""Numbers that the decoder's layers save for their backward, for each row of a pass.

Counted tensor by tensor, as Megatron's layers and the kernels save them (the principle of Korthikanti et al.,
arXiv 2205.05198; there are no attention matrices here).
"""

from laver_mcore.config.decoders import family_named
from laver_mcore.config.schema import Config


def num_chunks(config: Config) -> int:
    """Model chunks of all pipeline ranks together."""
    parallel = config.parallel
    return parallel.pipeline_model_parallel_size * (parallel.num_virtual_stages_per_pipeline_rank or 1)


def layer_sizes(config: Config) -> tuple[int, int, int, int, int, int]:
    """(TP, what shares out norms and residuals, D, F, query width, key or value width)."""
    model, parallel = config.model, config.parallel
    assert model.hidden_size and model.ffn_hidden_size and model.kv_channels
    assert model.num_attention_heads and model.num_query_groups
    tp = parallel.tensor_model_parallel_size
    along = tp if parallel.sequence_parallel else 1
    queries, keys = (n * model.kv_channels for n in (model.num_attention_heads, model.num_query_groups))
    return tp, along, model.hidden_size, model.ffn_hidden_size, queries, keys


def saved_per_row(config: Config) -> float:
    """Numbers that one decoder layer saves for its backward, for each row of the pass."""
    _, along, width, *_ = layer_sizes(config)
    granularity = config.parallel.recompute_granularity
    whole = whole_layer_per_row(config)
    if granularity != "full":
        return whole
    if config.parallel.recompute_method == "block":
        layers = (config.model.num_layers or 0) // num_chunks(config)
        share = min(1.0, (config.parallel.recompute_num_layers or 1) / layers)
        return share * width / along + (1 - share) * whole
    # Uniform: the input of every unit of so many layers.
    return width / along / (config.parallel.recompute_num_layers or 1)


def whole_layer_per_row(config: Config) -> float:
    """Numbers of a layer of which nothing is recomputed."""
    tp, along, width, ffn, queries, keys = layer_sizes(config)
    # Input and output of both norms; the outputs are the inputs of the matrices behind them.
    norms = 4 * width
    # The fused projection (v is a view of it), the attention's output, and queries and keys: rotated, or, where
    # attention is recomputed, the queries as they were handed over.
    attention = (queries + 2 * keys) + queries + queries
    if config.parallel.recompute_granularity != "selective":
        attention += keys
        if config.parallel.context_parallel_size > 1:
            attention += queries  # the output before its exchange
    if family_named(config.model.family).qk_norm:
        # The inputs of both norms, cut out of the projection; the outputs are what is rotated or handed over.
        attention += queries + keys
        if config.parallel.recompute_granularity == "selective":
            attention += keys
    # Both projections in one, and what fused SwiGLU makes of them.
    return norms / along + (attention + 3 * ffn) / tp + _adapters_per_row(config)


def _adapters_per_row(config: Config) -> float:
    """What comes out of each A, and with dropout what goes into it."""
    tp, along, width, ffn, queries, _ = layer_sizes(config)
    model, inputs = config.model, {"linear_qkv": width / along, "linear_fc1": width / along}
    inputs |= {"linear_proj": queries / tp, "linear_fc2": ffn / tp}
    return sum(
        model.lora_rank * len(adapted) + (inputs[layer] if model.lora_dropout else 0)
        for layer, adapted in model.adapted_layers.items()
    )
