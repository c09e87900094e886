"""Edits of the residual stream: of SAE latents, leaving the SAE's error alone, and of directions.

f are the latents of x, W_j the decoder row of latent j and d_j = W_j/|W_j|; m is the median residual norm at the site;
u = v/|v| for a direction v. Each row is a test.

| edit | what becomes of x or f | where latent j is inactive (f_j = 0) | unit of the number |
|---|---|---|---|
| `add(sae, j, s)` | x + s m d_j | the same | `norm` (m), `activation` (f_j + s), `p99` |
| `clamp(sae, j, c)` | f_j = c | f_j = c | `activation`, `p99`, `norm` |
| `clamp_min(sae, j, c)` | f_j = max(f_j, c) | f_j = max(0, c) | the same |
| `clamp_max(sae, j, c)` | f_j = min(f_j, c) | f_j = min(0, c) | the same |
| `scale(sae, j, a)` | f_j = a f_j | nothing | |
| `ablate(sae, j)` | f_j = 0 | nothing | |
| the first four with `only_if_active=True` | the same | nothing | |
| `add_direction(v, s)` | x + s v | | length of v, or with `median_norm=m`: m |
| `project_out(v)` | x - u (u.x) | | |
| `project_to(v, c)` | x + u (c - u.x) | | of the residual |
| `mean_ablate(v, mean)` | x + u (u.mean - u.x) | | |
| `cap(v, low=, high=)` | x + u (min(max(u.x, low), high) - u.x) | | of the residual |
| `affine(A, b)` | A x + b | | |

| put together | means |
|---|---|
| changed latents | x + (decode(f') - decode(f)): the SAE's error stays, and where f' = f no bit changes |
| `active` | f_j != 0, after the top k or the threshold, in x as the edit finds it |
| `a + b` | both read the same x, and what they add to it is added up; on one latent the later has the last word |
| `{site: [a, b]}` | b reads what a left |
| `{site: a, other: b}` | each at its own site; one further up sees what those below did |
| `a.on("response")` | on these token roles only; `generated`: on tokens that the model was not given |
| `a.on(start=n)`, `a.on(skip_special=True)` | from each row's token n on; not on special tokens |
| first token | left alone, an attention sink, unless `on(skip_first=False)`; padding always |
| `a.when(active(sae, k))`, `a.unless(probe(v, above=t))` | on tokens whose own x meets the condition, or does not |
| `a.over({0: 1, 32: 0})` | its change times a weight by the number of the generated token; given ones have number 0 |
"""

from __future__ import annotations

from saetools.steer.condition import Condition, Schedule, active, probe
from saetools.steer.directions import add_direction, affine, cap, mean_ablate, project_out, project_to
from saetools.steer.edits import SteeringEdit
from saetools.steer.latents import ablate, add, clamp, clamp_max, clamp_min, scale
from saetools.steer.numbers import median_norm
from saetools.steer.scope import Scope, Tokens
from saetools.steer.text import parse, parse_edits

__all__ = [
    "Condition",
    "Schedule",
    "Scope",
    "SteeringEdit",
    "Tokens",
    "ablate",
    "active",
    "add",
    "add_direction",
    "affine",
    "cap",
    "clamp",
    "clamp_max",
    "clamp_min",
    "mean_ablate",
    "median_norm",
    "parse",
    "parse_edits",
    "probe",
    "project_out",
    "project_to",
    "scale",
]
