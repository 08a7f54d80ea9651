# SPDX-License-Identifier: Apache-2.0
"""A worker (see pairs.py): MUSE in PyTorch.

    python theirs_muse.py train|decode BATCH eager|compile

The authors' code was missing. This is their network at IWSLT size (48 M parameters) as fairseq's
modules of that time compute it, written for this comparison alone: attention as two products and a
softmax, dynamic convolution by matrices with a band, decoding with a state that grows, reordered
for the beams at every step. It checks nothing and keeps no hypotheses, which favours it.

Runs in an environment of its own that has torch; imports nothing of ours.
"""

import sys

import theirs_device
import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, HIDDEN, DEPTH = 384, 4, 768, 12
SOURCE, TARGET, BEAM, STEPS, DROPOUT = 8848, 6632, 5, 30, 0.4


def heads(x):
    """[b, l, d] -> [b, n, l, c]"""
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def attend(query, key, value, mask=None):
    weights = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        weights = weights.masked_fill(mask, float("-inf"))
    y = weights.softmax(-1) @ value
    return y.transpose(1, 2).flatten(2)


class Dynamic(nn.Module):
    """Dynamic convolution: a kernel for every position and head."""

    def __init__(self, window, causal):
        super().__init__()
        self.window, self.causal = window, causal
        self.kernel = nn.Linear(WIDTH, HEADS * window, bias=False)

    def forward(self, value):
        b, length, _ = value.shape
        k = self.window
        kernel = self.kernel(value).view(b, length, HEADS, k).transpose(1, 2).softmax(-1)
        kernel = F.dropout(kernel, 0.1, self.training).reshape(b * HEADS, length, k)
        band = kernel.new_zeros(b * HEADS, length, length + k - 1)
        band.as_strided((b * HEADS, length, k), (length * (length + k - 1), length + k, 1)).copy_(
            kernel
        )
        before = k - 1 if self.causal else k // 2
        padded = F.pad(value, (0, 0, before, k - 1 - before))
        y = torch.bmm(band, heads(padded).reshape(b * HEADS, length + k - 1, -1))
        return y.view(b, HEADS, length, -1).transpose(1, 2).flatten(2)

    def step(self, value, state, name):
        """Computes one position, `value` [b, 1, d]; the state keeps the positions of the window."""
        before = state.get(name)
        if before is None:
            before = value.new_zeros(len(value), self.window - 1, WIDTH)
        window = torch.cat([before, value], 1)
        state[name] = window[:, 1:]
        kernel = self.kernel(value).view(len(value), HEADS, self.window, 1).softmax(2)
        return (heads(window) * kernel).sum(2).view(len(value), 1, WIDTH)


class Layer(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.convolutions = nn.ModuleList(Dynamic(k, causal) for k in (3, 15))
        self.gate = nn.Parameter(torch.full((2,), 0.5))
        self.output = nn.Linear(2 * WIDTH, WIDTH)
        self.hidden, self.pointwise = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        if causal:
            self.cross_query = nn.Linear(WIDTH, WIDTH)
            self.cross_key_value = nn.Linear(WIDTH, 2 * WIDTH)
            self.cross_output = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, memory=None, state=None):
        query, key, value = self.qkv(x).chunk(3, -1)
        gate = self.gate.softmax(0)
        mask = None
        if state is None:
            if self.causal:
                mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
                mask = mask.triu(1)
            mixed = [c(value) for c in self.convolutions]
        else:
            mixed = [c.step(value, state, f"window{i}") for i, c in enumerate(self.convolutions)]
            if "key" in state:
                key, value = (
                    torch.cat([state["key"], key], 1),
                    torch.cat([state["value"], value], 1),
                )
            state["key"], state["value"] = key, value
        convolved = sum(g * y for g, y in zip(gate, mixed, strict=True))
        attended = attend(heads(query), heads(key), heads(value), mask)
        terms = [self.output(torch.cat([attended, convolved], -1))]
        terms.append(self.pointwise(F.relu(self.hidden(x))))
        if memory is not None:
            if state is None:
                key, value = map(heads, self.cross_key_value(memory).chunk(2, -1))
            else:
                if "memory" not in state:
                    state["memory"] = tuple(map(heads, self.cross_key_value(memory).chunk(2, -1)))
                key, value = state["memory"]
            terms.append(self.cross_output(attend(heads(self.cross_query(x)), key, value)))
        y = sum(F.dropout(term, DROPOUT, self.training) for term in terms)
        return self.norm(x + y)


class Muse(nn.Module):
    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(SOURCE, WIDTH), nn.Embedding(TARGET, WIDTH)
        self.encoder = nn.ModuleList(Layer(False) for _ in range(DEPTH))
        self.decoder = nn.ModuleList(Layer(True) for _ in range(DEPTH))
        self.logits = nn.Linear(WIDTH, TARGET, bias=False)
        self.register_buffer("waves", torch.randn(512, WIDTH))

    def embed(self, table, tokens, first=0):
        waves = self.waves[first : first + tokens.shape[1]]
        return F.dropout(table(tokens) * WIDTH**0.5 + waves, DROPOUT, self.training)

    def encode(self, source):
        x = self.embed(self.source, source)
        for layer in self.encoder:
            x = layer(x)
        return x

    def forward(self, source, target):
        memory, x = self.encode(source), self.embed(self.target, target)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.logits(x)

    def step(self, tokens, at, memory, states):
        x = self.embed(self.target, tokens[:, None], at)
        for layer, state in zip(self.decoder, states, strict=True):
            x = layer(x, memory, state)
        return self.logits(x)[:, 0].log_softmax(-1)


def decode(model, source):
    b = len(source)
    memory = model.encode(source).repeat_interleave(BEAM, 0)
    states = [{} for _ in range(DEPTH)]
    tokens = torch.full((b * BEAM,), 2, device=source.device)
    total = torch.zeros(b, BEAM, device=source.device)
    first = torch.arange(b, device=source.device)[:, None] * BEAM
    for at in range(STEPS):
        log_p = model.step(tokens, at, memory, states).view(b, BEAM, -1)
        total, index = (total[..., None] + log_p).view(b, -1).topk(2 * BEAM)
        total, index = total[:, :BEAM], index[:, :BEAM]
        rows = (first + index // TARGET).flatten()
        tokens = (index % TARGET).flatten()
        for state in states:
            for name in ("key", "value", "window0", "window1"):
                state[name] = state[name].index_select(0, rows)


def main(work, batch, mode):
    torch.manual_seed(0)
    model = Muse().to(theirs_device.DEVICE)
    forward = torch.compile(model) if mode == "compile" else model
    length = 32 if work == "train" else 30
    source = torch.randint(4, 6000, (int(batch), length), device=theirs_device.DEVICE)
    if work == "train":
        optimizer = torch.optim.AdamW(model.parameters())

        def go():
            optimizer.zero_grad(set_to_none=True)
            with theirs_device.precision():
                logits = forward(source, source % TARGET)
                loss = F.cross_entropy(logits.flatten(0, 1), (source % TARGET).flatten())
            loss.backward()
            optimizer.step()

    else:
        model.eval()

        def go():
            with torch.inference_mode(), theirs_device.precision():
                decode(model, source)

    size = sum(p.numel() for p in model.parameters()) / 1e6
    theirs_device.serve(go, f"{mode}, {size:.1f} M parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
