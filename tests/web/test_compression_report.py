"""The figures of a compressed model show each matrix and each ratio where it belongs."""

from __future__ import annotations

from typing import Any

from laserlm.web.compression_report import perplexity_plot, rank_plot


def stored(matrix: str, rank: int, dense: str = "") -> dict[str, Any]:
    return {"matrix": matrix, "shape": [40, 20], "rank": rank, "parameters": rank * (60 - rank), "dense": dense}


def test_ranks_are_shares_by_block_and_matrix() -> None:
    matrices = [stored("decoder.0.q_proj", 5), stored("encoder.10.q_proj", 10), stored("encoder.2.fc_in", 20, "kept dense")]
    (trace,) = rank_plot(matrices).data
    assert list(trace.x) == ["decoder.0", "encoder.2", "encoder.10"]
    assert list(trace.y) == ["decoder.q_proj", "encoder.q_proj", "encoder.fc_in"]
    assert [list(row) for row in trace.z] == [[0.25, None, None], [None, None, 0.5], [None, 1.0, None]]
    assert trace.text[0][0] == "<b>decoder.0.q_proj</b>, 40 x 20<br>rank 5 of 20<br>two factors, 34% of the parameters"


def test_perplexities_are_in_order_of_the_ratio_above_the_unchanged_model() -> None:
    figure = perplexity_plot({"base": 10.0, "at": {"0.8": 12.0, "0.6": 20.0}})
    assert list(zip(figure.data[0].x, figure.data[0].y, strict=True)) == [(0.6, 20.0), (0.8, 12.0)]
    assert list(figure.data[1].y) == [10.0, 10.0]


def test_quantised_models_are_lines_at_their_perplexity() -> None:
    quantised = {"q8_0": {"bytes": 1_000_000, "perplexity": 10.1}, "q4_0": {"bytes": 600_000, "perplexity": 11.0}}
    figure = perplexity_plot({"base": 10.0, "at": {"0.8": 12.0}, "quantised": quantised})
    assert [(trace.name, list(trace.x), list(trace.y)) for trace in figure.data[1:]] == [
        ("unchanged model", [0.8, 1], [10.0, 10.0]),
        ("q8_0, 1.0 MiB", [0.8, 1], [10.1, 10.1]),
        ("q4_0, 0.6 MiB", [0.8, 1], [11.0, 11.0]),
    ]
