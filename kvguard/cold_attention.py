"""Attention of drafted tokens over parked entries: one row in one piece, in parts, several rows."""

import torch


def _beyond(count: int, rows: int, device: torch.device) -> torch.Tensor:
    """(rows, count) bool: which of its own draft's tokens a query must not see."""
    beyond = torch.ones(count, count, dtype=torch.bool, device=device).triu(1)
    return beyond.repeat(rows // count, 1)


def attend_whole(query: torch.Tensor, whole: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of one row's last tokens over all its entries, in one call.

    Args:
        query: (query heads, n, head_dim).
        whole: (2, heads, tokens, head_dim), the last n of them the queries' own.
        scale: factor on the scores.

    Returns:
        (query heads, n, head_dim).
    """
    count = query.shape[1]
    grouped = query.reshape(whole.shape[1], -1, query.shape[2])
    mask = torch.zeros(grouped.shape[1], whole.shape[2], dtype=query.dtype, device=query.device)
    mask[:, -count:].masked_fill_(_beyond(count, len(mask), query.device), -torch.inf)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        grouped[None], whole[0][None], whole[1][None], attn_mask=mask, scale=scale
    )
    return mixed[0].reshape(query.shape)


def attend_parts(query: torch.Tensor, parts: list[torch.Tensor], scale: float) -> torch.Tensor:
    """Causal attention of one row's last tokens over its parts, of which the last is their own.

    The query heads that share a key head are concatenated on the query axis, so grouped keys
    and values are read once, where they lie, and never repeated.

    Args:
        query: (query heads, n, head_dim).
        parts: (2, heads, tokens, head_dim) each.
        scale: factor on the scores.

    Returns:
        (query heads, n, head_dim).
    """
    heads, size = parts[0].shape[1], parts[0].shape[3]
    count = query.shape[1]
    scaled = query.reshape(heads, -1, size) * scale  # (heads, query heads per head x n, head_dim)
    scores = torch.cat([torch.matmul(scaled, part[0].transpose(1, 2)) for part in parts], dim=2)
    beyond = _beyond(count, scores.shape[1], query.device)
    scores[:, :, -count:].masked_fill_(beyond, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    mixed, start = torch.zeros_like(scaled), 0
    for part in parts:
        end = start + part.shape[2]
        mixed += torch.matmul(weights[:, :, start:end], part[1])
        start = end
    return mixed.reshape(query.shape)


def _partial(
    scaled: torch.Tensor, part: torch.Tensor, beyond: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention over one part: the weighted sum, the largest score and the sum of the weights.

    Args:
        scaled: (heads, queries, head_dim).
        part: (2, heads, tokens, head_dim).
        beyond: (queries, tokens) bool, what a query must not see.
    """
    scores = torch.matmul(scaled, part[0].transpose(1, 2)).float()
    if beyond is not None:
        scores.masked_fill_(beyond, -torch.inf)
    peak = scores.amax(dim=2, keepdim=True)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(dim=2, keepdim=True)
    return torch.matmul(weights.to(part.dtype), part[1]).float(), peak, total


def attend_shared(
    query: torch.Tensor, shared: torch.Tensor, rest: list[list[torch.Tensor]], scale: float
) -> torch.Tensor:
    """Causal attention of several rows' last tokens; what all of them begin with is read once.

    The parts' softmaxes are joined as flash attention (arXiv 2205.14135) joins its blocks.

    Args:
        query: (query heads, tokens, head_dim), one row behind the other.
        shared: (2, heads, tokens, head_dim).
        rest: per row its further parts, the last one its own n tokens.
        scale: factor on the scores.

    Returns:
        (query heads, tokens, head_dim).
    """
    heads, size = shared.shape[1], shared.shape[3]
    scaled = query.reshape(heads, -1, query.shape[1], size) * scale  # (heads, groups, tokens, ...)
    groups = scaled.shape[1]
    common = _partial(scaled.reshape(heads, -1, size), shared)
    by_token = [each.view(heads, groups, query.shape[1], -1) for each in common]
    mixed, start = [], 0
    for parts in rest:
        count = parts[-1].shape[2]
        own = slice(start, start + count)
        start += count
        asked = scaled[:, :, own].reshape(heads, -1, size)
        beyond = _beyond(count, asked.shape[1], query.device)
        mine = [each[:, :, own].reshape(heads, asked.shape[1], -1) for each in by_token]
        found = [(mine[0], mine[1], mine[2])]
        found += [_partial(asked, part) for part in parts[:-1]]
        found.append(_partial(asked, parts[-1], beyond))
        peak = torch.stack([each[1] for each in found]).amax(dim=0)
        factors = [torch.exp(each[1] - peak) for each in found]
        joined, total = torch.zeros_like(found[0][0]), torch.zeros_like(peak)
        for each, factor in zip(found, factors, strict=True):
            joined += each[0] * factor
            total += each[2] * factor
        mixed.append((joined / total).to(query.dtype).view(heads * groups, count, size))
    return torch.cat(mixed, dim=1)
