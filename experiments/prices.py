"""What training costs on rented nodes, and shapes of cluster compared by the price of a token."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..sim.hardware import Cluster
from ..sim.result import StepResult
from .simulate import training_days
from .tables import table

if TYPE_CHECKING:
    from rich.table import Table

SECONDS_PER_HOUR = 3_600
MILLION = 1e6
BILLION = 1e9
NO_PRICE = "no price"


def price_of(result: StepResult, cluster: Cluster) -> dict[str, Any] | None:
    """What the job of `result` costs, or None where the cluster's price is not known: never 0.

    Returns:
        nodes, per_hour_usd (of all of them), per_million_tokens_usd, per_billion_tokens_usd, and kind, region, as_of
        and source of the price.
    """
    if cluster.price is None:
        return None
    gpus = int(result.layout["gpus"])
    per_hour = cluster.price.job_usd(gpus=gpus, gpus_per_node=cluster.gpus_per_node, seconds=SECONDS_PER_HOUR)
    per_token = per_hour / SECONDS_PER_HOUR / result.tokens_per_s
    return {
        "nodes": math.ceil(gpus / cluster.gpus_per_node),
        "per_hour_usd": per_hour,
        "per_million_tokens_usd": per_token * MILLION,
        "per_billion_tokens_usd": per_token * BILLION,
        "kind": cluster.price.kind,
        "region": cluster.price.region,
        "as_of": cluster.price.as_of,
        "source": cluster.sources["price"],
    }


def training(result: StepResult, cluster: Cluster, tokens: float) -> dict[str, Any]:
    """Days, GPU hours and price of a budget of tokens; `price_usd` is None where the cluster has no price."""
    price = price_of(result, cluster)
    return {
        "tokens": tokens,
        **training_days(result, tokens),
        "price_usd": price["per_million_tokens_usd"] * tokens / MILLION if price else None,
    }


def costs(result: StepResult, cluster: Cluster, tokens: float | None, *, compared: bool) -> dict[str, Any]:
    """What `simulate --json` adds: `price` where tokens are given or clusters compared, `training` for the tokens."""
    price = {"price": price_of(result, cluster)} if compared or tokens is not None else {}
    return price if tokens is None else {**price, "training": training(result, cluster, tokens)}


def usd(value: float | None) -> str:
    """ "1,234 USD", cents below 100, or that there is no price."""
    return NO_PRICE if value is None else f"{_amount(value)} USD"


def _amount(value: float | None) -> str:
    if value is None:
        return NO_PRICE
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"


def shape_rows(answers: Sequence[Mapping[str, Any]], clusters: Sequence[Cluster]) -> list[dict[str, Any]]:
    """One row per answer of `simulate --json`, cheapest token first, those without a price last."""
    rows = []
    for answer, cluster in zip(answers, clusters, strict=True):
        price = answer["price"] or {}
        rows.append(
            {
                "cluster": cluster.name,
                "gpu": cluster.processor.name,
                "gpus": answer["layout"]["gpus"],
                "step_time_s": answer["step_time_s"],
                "tokens_per_s": answer["tokens_per_s"],
                "mfu": answer["mfu"],
                "fits": answer["fits"],
                "per_hour_usd": price.get("per_hour_usd"),
                "per_billion_tokens_usd": price.get("per_billion_tokens_usd"),
                "price_as_of": price.get("as_of"),
                "days": answer.get("training", {}).get("days"),
                "price_usd": answer.get("training", {}).get("price_usd"),
            }
        )
    return sorted(rows, key=_price_of_a_token)


def _price_of_a_token(row: Mapping[str, Any]) -> float:
    price = row["per_billion_tokens_usd"]
    return math.inf if price is None else price


def shape_table(rows: Sequence[Mapping[str, Any]], model: str) -> "Table":
    """`shape_rows` in a terminal; days and their price only where tokens were given."""
    budget = any(row["days"] is not None for row in rows)
    columns = ("cluster", "GPU", "GPUs", "1e3 tokens/s", "MFU", "fits", "USD/h", "USD/1e9 tokens")
    lines = []
    for row in rows:
        per_token, price = row["per_billion_tokens_usd"], row["price_usd"]
        line = (
            row["cluster"],
            row["gpu"],
            f"{row['gpus']:,}",
            f"{row['tokens_per_s'] / 1e3:,.4g}",
            f"{row['mfu']:.1%}",
            "yes" if row["fits"] else "NO",
            _amount(row["per_hour_usd"]),
            "-" if per_token is None else _amount(per_token),
        )
        lines.append((*line, f"{row['days']:,.1f}", "-" if price is None else _amount(price)) if budget else line)
    title = f"{model} by shape, cheapest token first"
    return table(title, (*columns, "days", "USD") if budget else columns, lines)
