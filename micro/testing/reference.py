"""What every operator computes, in plain PyTorch. Written to be read: this is the specification in code.

Each function has the name, the arguments and the results of its fast counterpart in :mod:`micro.ops`. Nothing here is
fast, and nothing here is used outside tests and benchmarks.

Letters: T tokens, E experts, K experts per token, N = T*K routed pairs, H hidden, A query heads, G key/value heads,
D head size, B rows, S slots of this call, C cached slots, J = C + S key slots, V vocabulary, L layers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from micro.experts import BlockParameters, Plan, Routing

EPSILON = 1e-9  # of the renormalisation (model.md 2.3)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and statistics are carried: float64 for float64, float32 for anything narrower."""
    return torch.promote_types(dtype, torch.float32)


def route(
    logits: Tensor | None,
    k: int,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    ablate: Tensor | None = None,
    force: Tensor | None = None,
    replay: Tensor | None = None,
    weight_rule: str = "renormalized",
) -> Routing:
    """Router logits to a routing decision, with steering (model.md 2.3, 2.9, 2.10, 4.3).

    logits [T,E]; rows [T,E] replace the probabilities; bias float32, ablate bool [T|1,E]; force int32 [T|1], -1 free;
    replay int32 [T,K] takes these ids and recomputes their scores.
    """
    given = rows if rows is not None else logits
    assert given is not None, "logits or rows"
    out = logits.dtype if logits is not None else given.dtype
    if rows is not None or logits is None:
        effective = given.to(wide(out))
        p = effective
    else:
        effective = logits.to(wide(logits.dtype))
        if bias is not None:
            effective = effective + bias.to(effective.dtype)
        if ablate is not None:
            effective = effective.masked_fill(ablate, -math.inf)
        if force is not None:
            forced = F.one_hot(force.clamp(min=0).long(), logits.shape[-1]).bool().expand_as(effective)
            held = (force >= 0)[:, None].expand_as(effective)
            certain = torch.where(forced, 0.0, -math.inf).to(effective.dtype)
            effective = torch.where(held, certain, effective)
        p = effective.softmax(-1)
    # NaN ranks below everything; equal values keep the lower id first.
    order = p.detach().nan_to_num(nan=-1.0).sort(dim=-1, descending=True, stable=True).indices
    ids = order[:, :k] if replay is None else replay.long()
    q = p.gather(-1, ids)
    if weight_rule == "renormalized":
        # Values q/(sum+eps); the gradient is the closed form (delta - sum w delta)/(sum+eps), which autograd gives.
        w = q / (q.sum(-1, keepdim=True) + EPSILON)
    elif weight_rule == "probability":
        w = q
    else:  # straight_through
        w = (q / (q.sum(-1, keepdim=True) + EPSILON)).detach() + q - q.detach()
    return Routing(ids.to(torch.int32), w.to(out), p, effective)


def plan(ids: Tensor, num_experts: int, weights: Tensor | None = None, mask: Tensor | None = None) -> Plan:
    """Routed pairs sorted by expert; stable, so tokens of one expert stay in slot order.

    ids int32 [T,K], weights [T,K], mask bool [T]. Pairs with weight 0 and pairs of masked tokens are *idle*: they stand
    behind the last expert's rows, at n >= offsets[E], and nothing is computed for them.
    """
    tokens_count, k = ids.shape
    pair = torch.arange(tokens_count * k)
    key = ids.reshape(-1).long().clone()
    if weights is not None:
        key[(weights.reshape(-1) == 0)] = num_experts
    if mask is not None:
        key[~mask[pair // k]] = num_experts
    order = key.sort(stable=True).indices
    inverse = torch.empty_like(order)
    inverse[order] = pair
    counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    int32 = torch.int32
    return Plan(
        (order // k).to(int32), ids.reshape(-1)[order], offsets.to(int32), inverse.view(tokens_count, k).to(int32)
    )


def permute(x: Tensor, tokens: Tensor, offsets: Tensor, inverse: Tensor) -> Tensor:
    """Copies x [T,H] to rows in plan order [N,H]; idle rows are 0."""
    active = torch.arange(tokens.numel()) < offsets[-1]
    return torch.where(active[:, None], x[tokens.long()], 0)


def combine(y: Tensor, weights: Tensor, experts: Tensor, offsets: Tensor, inverse: Tensor) -> Tensor:
    """Weighted sum of a token's expert outputs, experts ascending, each product and sum in the model dtype
    (model.md 2.8). y [N,H] in plan order, weights [T,K], experts [N]; idle pairs contribute nothing. Returns [T,H].
    """
    out = torch.zeros(weights.shape[0], y.shape[1], dtype=y.dtype)
    n = inverse.long()
    for e in range(offsets.numel() - 1):
        for i in range(weights.shape[1]):
            mine = (n[:, i] < offsets[-1]) & (experts[n[:, i]] == e)
            term = y[n[:, i]] * weights[:, i, None].to(y.dtype)
            out = torch.where(mine[:, None], out + term, out)
    return out


def expert_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """y[n] = weight[e(n)] @ x[n] for rows in plan order. x [N,in], weight [E,out,in] -> [N,out]; idle rows are 0."""
    bounds = offsets.tolist()
    parts = [x[bounds[e] : bounds[e + 1]] @ weight[e].T for e in range(weight.shape[0])]
    idle = x.new_zeros(x.shape[0] - bounds[-1], weight.shape[1])
    return torch.cat([*parts, idle])


def stacked_linear(x: Tensor, weight: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Every token through every expert that has a routed token: x [E|1,T,in], weight [E,out,in] -> [E,T,out].

    Experts with offsets[e] == offsets[e+1] are skipped: their output is 0 and their gradient is 0. None: all are used.
    """
    y = torch.matmul(x, weight.transpose(1, 2))
    if offsets is None:
        return y
    return torch.where((offsets.diff() > 0)[:, None, None], y, 0)


def rms_norm(
    x: Tensor, gain: Tensor, expert: Tensor | None = None, *, eps: float, gain_in_float32: bool = False
) -> Tensor:
    """Root-mean-square norm, one gain vector per expert (model.md 2.2).

    With expert [...]: x [...,H], gain [E,H], row-wise gains. Without: x [E|1,...,H] has a leading expert axis and the
    result is [E,...,H] (E = 1: any x [...,H], result like x).
    """
    normalized = x.to(wide(x.dtype))
    normalized = normalized * torch.rsqrt(normalized.square().mean(-1, keepdim=True) + eps)
    if expert is not None:
        row_gain = gain[expert.long()]
    elif gain.shape[0] == 1:
        row_gain = gain[0]
    else:
        row_gain = gain.view(gain.shape[0], *[1] * (x.dim() - 2), gain.shape[1])
    if gain_in_float32:
        return (normalized * row_gain.to(normalized.dtype)).to(x.dtype)
    return normalized.to(x.dtype) * row_gain


def rope_frequencies(head_dim: int, theta: float, scaling: tuple[float, float, float, float] | None = None) -> Tensor:
    """f_i = 1 / theta^(2i/D) in float32, in this order (model.md 2.2). scaling: (factor, low, high, old context) of
    Llama 3. Returns [D/2] float32.
    """
    f = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if scaling is None:
        return f
    factor, low, high, context = scaling
    wavelength = 2 * math.pi / f
    smooth = (context / wavelength - low) / (high - low)
    middle = (1 - smooth) * f / factor + smooth * f
    return torch.where(wavelength < context / high, f, torch.where(wavelength > context / low, f / factor, middle))


def rope_table(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * frequency, all in float32 (model.md 2.2). position_ids int64 [P], frequencies
    float32 [D/2]. Returns two tensors [P,D/2] float32.
    """
    angle = position_ids[:, None].to(torch.float32) * frequencies
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Half-split rotation (model.md 2.2). x [...,T,heads,D] (tokens None) or [N,heads,D] with tokens int32 [N];
    cos, sin [T,D/2] float32 or float64, already rounded to the model dtype where the family does so.
    """
    if tokens is not None:
        cos, sin = cos[tokens.long()], sin[tokens.long()]
    a, b = x.to(wide(x.dtype)).chunk(2, -1)
    cos, sin = cos[:, None].to(a.dtype), sin[:, None].to(a.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def expert_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    *,
    slots: int,
    start: int = 0,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Some queries, all keys of their expert, causal by slot (model.md 2.6, 2.7).

    q [N,A,D] in plan order, k and v [B,E,G,J,D] (any strides with D contiguous), tokens int32 [N], offsets int32 [E+1].
    Token t stands in row t // slots at slot start + t % slots and sees key slots j <= its own with mask[b,j].
    mask: None, bool [B,J], or [B|1,S,J] bool (True = visible) or float (added to the scores): the last two replace the
    causal rule. A query that sees no key gets 0. Idle rows are 0. Returns [N,A,D].
    """
    n_rows, heads, head_dim = q.shape
    groups = k.shape[2]
    scale = head_dim**-0.5 if scale is None else scale
    acc = wide(q.dtype)
    bounds = offsets.tolist()
    out = []
    for e in range(k.shape[1]):
        for n in range(bounds[e], bounds[e + 1]):
            b, s = divmod(int(tokens[n]), slots)
            keys, values = (t[b, e].to(acc).repeat_interleave(heads // groups, 0) for t in (k, v))
            scores = torch.einsum("ad,ajd->aj", q[n].to(acc), keys) * scale
            if mask is not None and mask.dim() == 3:
                own = mask[b if mask.shape[0] > 1 else 0, s]
                scores = scores.masked_fill(~own, -math.inf) if own.dtype == torch.bool else scores + own.to(acc)
            else:
                visible = torch.arange(k.shape[3]) <= start + s
                if mask is not None:
                    visible = visible & mask[b]
                    visible = visible & mask[b, start + s]  # a padded query sees nothing
                scores = scores.masked_fill(~visible, -math.inf)
            sees = torch.isfinite(scores).any(-1, keepdim=True)
            p = torch.where(sees, scores, 0.0).softmax(-1) * sees
            out.append(torch.einsum("aj,ajd->ad", p, values).to(q.dtype))
    idle = q.new_zeros(n_rows - bounds[-1], heads, head_dim)
    return torch.cat([torch.stack(out), idle]) if out else idle


def block_forward(
    x: Tensor,
    parameters: BlockParameters,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    whole_block: bool,
    eps: float,
    slots: int,
    start: int = 0,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    mask: Tensor | None = None,
    real: Tensor | None = None,
    k: int = 1,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    ablate: Tensor | None = None,
    force: Tensor | None = None,
    replay: Tensor | None = None,
    weight_rule: str = "renormalized",
    run_router: bool = True,
) -> tuple[Tensor, Tensor | None, Routing]:
    """One layer, whole blocks (model.md 2.4 - 2.8) or FFN experts (2.12), Llama or OLMo-2.

    keys and values [B,E|1,G,J,D] are read below slot ``start`` and written from there on; None: there is no cache.
    """
    if x.dim() == 3:
        known = {name: value for name, value in locals().items() if name != "x"}
        y, raw, routing = block_forward(x.flatten(0, 1), **known)
        return y.view(x.shape), raw, routing
    p, experts, size = parameters, parameters.gate_proj.shape[0], 2 * cos.shape[-1]
    olmo = p.post_ffn_norm is not None

    def stack(shared: Tensor) -> Tensor:
        return shared if whole_block else shared[None]

    def norm(x: Tensor, gain: Tensor | None, expert: Tensor | None = None) -> Tensor:
        assert gain is not None
        return rms_norm(x, stack(gain), expert, eps=eps, gain_in_float32=olmo)

    def decide(n: Tensor) -> tuple[Tensor | None, Routing, Plan]:
        raw = None
        if run_router or rows is None:
            if p.router_in is None:
                raw = n.to(p.router_out.dtype) @ p.router_out.T
            else:
                raw = n @ p.router_in.T @ p.router_out.T
        if rows is not None:
            routing = route(None, k, rows=rows, replay=replay, weight_rule=weight_rule)
        else:
            routing = route(raw, k, bias=bias, ablate=ablate, force=force, replay=replay, weight_rule=weight_rule)
        routing = routing._replace(weights=routing.weights.to(x.dtype))
        return raw, routing, plan(routing.ids, experts, routing.weights, real)

    def attention(xs: Tensor, n: Tensor, tokens: Tensor, expert: Tensor | None, offsets: Tensor) -> Tensor:
        """Of queries xs in plan order and inputs n [E|1,T,H] of keys and values, behind the output matrix."""
        q, new = expert_linear(xs, stack(p.q_proj), offsets), stacked_linear(n, stack(p.k_proj))
        if olmo:
            q, new = norm(q, p.q_norm, expert), norm(new, p.k_norm)
        groups = new.shape[-1] // size
        new = torch.stack([rope(e.unflatten(-1, (groups, size)), cos, sin) for e in new])
        both = []
        for made, store in ((new, keys), (stacked_linear(n, stack(p.v_proj)), values)):
            made = made.reshape(made.shape[0], -1, slots, groups, size).permute(1, 0, 3, 2, 4)
            if store is not None:
                store[:, :, :, start : start + slots] = made
                made = store[:, :, :, : start + slots]
            both.append(made)
        q = rope(q.unflatten(-1, (heads, size)), cos, sin, tokens)
        a = expert_attention(q, both[0], both[1], tokens, offsets, slots=slots, start=start, mask=mask)
        return expert_linear(a.flatten(1), stack(p.o_proj), offsets)

    def ffn(n: Tensor, offsets: Tensor) -> Tensor:
        inner = swiglu(expert_linear(n, p.gate_proj, offsets), expert_linear(n, p.up_proj, offsets))
        return expert_linear(inner, p.down_proj, offsets)

    def mixed(y: Tensor, routing: Routing, plan: Plan) -> Tensor:
        return combine(y, routing.weights, plan.experts, plan.offsets, plan.inverse)

    if whole_block:
        raw, routing, order = decide(x)
        xs = permute(x, order.tokens, order.offsets, order.inverse)
        n = x.expand(experts, -1, -1) if olmo else norm(x[None], p.input_norm)
        queries = xs if olmo else norm(xs, p.input_norm, order.experts)
        a = attention(queries, n, order.tokens, order.experts, order.offsets)
        u = xs + (norm(a, p.post_attention_norm, order.experts) if olmo else a)
        f = ffn(u if olmo else norm(u, p.post_attention_norm, order.experts), order.offsets)
        return mixed(u + (norm(f, p.post_ffn_norm, order.experts) if olmo else f), routing, order), raw, routing
    tokens = torch.arange(x.shape[0], dtype=torch.int32)
    n = x if olmo else norm(x, p.input_norm)
    a = attention(n, n[None], tokens, None, torch.tensor([0, x.shape[0]], dtype=torch.int32))
    u = x + (norm(a, p.post_attention_norm) if olmo else a)
    n = u if olmo else norm(u, p.post_attention_norm)
    raw, routing, order = decide(n)
    m = mixed(ffn(permute(n, order.tokens, order.offsets, order.inverse), order.offsets), routing, order)
    return u + (norm(m, p.post_ffn_norm) if olmo else m), raw, routing


def block_train(
    x: Tensor,
    parameters: BlockParameters,
    cos: Tensor,
    sin: Tensor,
    *,
    heads: int,
    eps: float,
    slots: int,
    mask: Tensor | None = None,
    real: Tensor | None = None,
    k: int = 1,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    ablate: Tensor | None = None,
    force: Tensor | None = None,
    replay: Tensor | None = None,
    weight_rule: str = "renormalized",
    run_router: bool = True,
    activations: str = "save",
) -> tuple[Tensor, Tensor | None, Routing]:
    """One layer of whole blocks without a cache; its gradients are those that autograd finds for :func:`block_forward`.

    activations only says what is kept for them: it changes no value.
    """
    return block_forward(
        x, parameters, cos, sin, heads=heads, whole_block=True, eps=eps, slots=slots, mask=mask, real=real, k=k,
        rows=rows, bias=bias, ablate=ablate, force=force, replay=replay, weight_rule=weight_rule, run_router=run_router,
    )  # fmt: skip


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the product in float32, rounded once."""
    acc = wide(gate.dtype)
    return (F.silu(gate.to(acc)) * up.to(acc)).to(gate.dtype)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Sum over targets != ignore_index of -log softmax(hidden @ weight.T)[target], logits widened to float32
    (model.md 7.1). hidden [T,H], weight [V,H], targets int64 [T]. Returns a scalar in the wide dtype; 0 without target.
    """
    logits = (hidden @ weight.T).to(wide(hidden.dtype))
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")


def load_balancing_loss(probs: Tensor, ids: Tensor, mask: Tensor | None = None, *, pooled: bool = True) -> Tensor:
    """E * sum_k sum_e f[k,e] P[e] (model.md 7.2). probs [L,T,E], ids int32 [L,T,K], mask bool [T].
    pooled: one pool over layers and tokens (Mixtral); else per layer, then the mean over layers (Switch).
    """
    _, tokens, experts = probs.shape
    m = torch.ones(tokens, dtype=probs.dtype) if mask is None else mask.to(probs.dtype)
    chosen = F.one_hot(ids.long(), experts).to(probs.dtype)  # [L,T,K,E]
    total = m.sum().clamp(min=1)
    f = torch.einsum("ltke,t->lke", chosen, m) / total
    p = torch.einsum("lte,t->le", probs, m) / total
    if pooled:
        return experts * (f.mean(0) * p.mean(0)).sum()
    return experts * (f * p[:, None]).sum((1, 2)).mean()


def z_loss(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over layers and real tokens of logsumexp(logits)^2 (model.md 7.3). logits [L,T,E], mask bool [T]."""
    z = logits.to(wide(logits.dtype)).logsumexp(-1).square()
    m = torch.ones(z.shape[1], dtype=z.dtype) if mask is None else mask.to(z.dtype)
    return (z * m).sum() / (m.sum() * z.shape[0]).clamp(min=1)


def label_loss(
    logits: Tensor, labels: Tensor, mask: Tensor | None = None, *, layer_weights: Tensor | None = None
) -> Tensor:
    """**Sum** over layers and labelled real tokens of -c_l log softmax(logits)[label], divided by sum of c_l
    (model.md 7.4, before the division by the number of tokens). logits [L,T,E], labels int64 [T] (-1: none),
    mask bool [T], layer_weights [L]. Returns a scalar.
    """
    z = logits.to(wide(logits.dtype))
    c = torch.ones(z.shape[0], dtype=z.dtype) if layer_weights is None else layer_weights.to(z.dtype)
    keep = labels >= 0 if mask is None else (labels >= 0) & mask
    nll = -z.log_softmax(-1).gather(-1, labels.clamp(min=0)[None, :, None].expand(z.shape[0], -1, 1))[..., 0]
    return (c[:, None] * torch.where(keep, nll, 0)).sum() / c.sum().clamp(min=1e-30)


def routing_entropy(probs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over real tokens of -sum p log p, natural logarithm, 0 log 0 = 0 (model.md 7.5). probs [...,T,E],
    mask bool [T]. Returns [...]: one mean decision entropy per leading index (per layer).
    """
    possible = torch.where(probs > 0, probs, 1)  # 0 log 0 = 0, and its gradient is 0 as well
    h = -(possible * possible.log()).sum(-1)
    m = torch.ones(h.shape[-1], dtype=h.dtype) if mask is None else mask.to(h.dtype)
    return (h * m).sum(-1) / m.sum().clamp(min=1)


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) by Philox 4x32-10 (Salmon et al. 2011), key = seed, counter = step."""
    word = 0xFFFFFFFF
    c0, c1, c2, c3, k0, k1 = step & word, step >> 32 & word, 0, 0, seed & word, seed >> 32 & word
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & word, (a >> 32) ^ c3 ^ k1, a & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return ((c0 << 32 | c1) >> 11) * 2.0**-53


def _kept_shares(z: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities of one row after top-k and top-p, in float64; ties at the k-th place stay."""
    z = z.double().nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if top_k:
        z = z.masked_fill(z < z.topk(min(top_k, len(z))).values[-1], -math.inf)
    p = (z == math.inf).double() if (z == math.inf).any() else z.softmax(0)
    p, order = (p / p.sum()).sort(descending=True, stable=True)
    before = p.cumsum(0) - p
    keep = (before < top_p) | (torch.arange(len(z)) == 0)
    p = torch.zeros_like(p).scatter(0, order, p * keep)
    return p / p.sum()


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    previous: Tensor | None = None,
    min_new_tokens: int = 0,
    stop_ids: Tensor | None = None,
    seeds: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """The next token of each row: the first id at which the summed shares exceed the row's uniform number."""
    z = logits.detach().to(wide(logits.dtype), copy=True)
    out = []
    for b, row in enumerate(z):
        if previous is not None:
            ids = previous[b][(previous[b] >= 0) & (previous[b] < len(row))]
            row[ids] = torch.where(row[ids] < 0, row[ids] * repetition_penalty, row[ids] / repetition_penalty)
        if steps is not None and stop_ids is not None and int(steps[b]) < min_new_tokens:
            row[stop_ids[(stop_ids >= 0) & (stop_ids < len(row))]] = -math.inf
        numbers = ~row.isnan()
        above = row.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        if temperature == 0 or not (above > -math.inf).any():
            best = numbers & (above == above.max())
            out.append(int(best.int().argmax()))
            continue
        assert seeds is not None and steps is not None
        reached = _kept_shares(row / temperature, top_k, top_p).cumsum(0)
        u = _uniform(int(seeds[b]), int(steps[b])) * float(reached[-1])
        out.append(int(torch.searchsorted(reached, u, right=True)))
    return torch.tensor(out, dtype=torch.int64)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Square root of the sum of all squares, in float64: what clipping by the global norm divides by. A scalar."""
    return torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()


def adamw_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    masters: list[Tensor],
    *,
    step: int,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    gradient_scale: float = 1.0,
) -> None:
    """One step of AdamW with decoupled decay, in place (Loshchilov and Hutter 2019, algorithm 2).

    Moments are float32 (float64 for float64). masters: an empty list, or one float32 copy per parameter that carries
    the value while the bfloat16 parameter is its rounding. gradient_scale multiplies every gradient (clipping).
    """
    for i, (p, g, m, v) in enumerate(zip(parameters, gradients, first_moments, second_moments, strict=True)):
        value = masters[i] if masters else p
        g = g.to(m.dtype) * gradient_scale
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        value.mul_(1 - learning_rate * weight_decay)
        denominator = (v / (1 - beta2**step)).sqrt_().add_(eps)
        value.addcdiv_(m / (1 - beta1**step), denominator, value=-learning_rate)
        if masters:
            p.copy_(value)


def intervene(
    x: Tensor,
    change: str,
    *,
    touched: Tensor | None = None,
    experts: Tensor | None = None,
    columns: Tensor | None = None,
    value: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """As :func:`micro.ops.intervene`."""
    rows, width = x.shape
    rows_touched = x.new_ones(rows, dtype=torch.bool) if touched is None else touched
    expert = torch.zeros(rows, dtype=torch.long, device=x.device) if experts is None else experts.long()
    expert = torch.where(rows_touched, expert, 0)
    changed = rows_touched[:, None].expand(rows, width)
    if columns is not None:
        changed = changed & columns[expert]
    if value is None:
        return torch.where(changed, 0, x)
    if index is not None:
        mine = value[torch.where(rows_touched, index, 0)]
    else:
        mine = value.expand(rows, -1) if len(value) == 1 else value[expert]
    new = {"scale": x * mine, "shift": x + mine, "replace": mine.expand(rows, width)}[change]
    return torch.where(changed, new, x)


def moments_(
    x: Tensor,
    count: Tensor,
    mean: Tensor,
    m2: Tensor,
    scatter: Tensor | None = None,
    *,
    touched: Tensor | None = None,
    experts: Tensor | None = None,
) -> None:
    """Streaming moments per expert, in place, row after row (Welford 1962)."""
    for n, row in enumerate(x.double()):
        if touched is not None and not touched[n]:
            continue
        e = 0 if experts is None else int(experts[n])
        count[e] += 1
        before = row - mean[e]
        mean[e] += before / count[e]
        after = row - mean[e]
        m2[e] += before * after
        if scatter is not None:
            scatter[e] += before[:, None] * after
