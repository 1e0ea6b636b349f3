"""The demo's report as one page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from micro.analysis.figures import accuracy_figure, loss_figure
from micro.demo.verdict import verdicts
from micro.report import Page, figure_html, table_html, token_views_html
from micro.report.tokens import STYLE

if TYPE_CHECKING:
    import pandas as pd

    from micro.demo.result import DemoResult


def build_page(result: DemoResult) -> Page:
    """All sections of the report, drawn from the result alone."""
    plan = result.plan
    page = Page(
        "Mixture of Cognitive Reasoners, trained in minutes",
        f"{plan.title}, upcycled to four experts per block, trained in three stages on generated labelled answers and "
        "tested on sentence templates that it never saw.",
    )
    _claims(page, result)
    _routing(page, result)
    _tokens(page, result)
    _ablation(page, result)
    _steering(page, result)
    _training(page, result)
    _method(page, result)
    return page


def _claims(page: Page, result: DemoResult) -> None:
    page.section("Claims")
    for verdict in verdicts(result):
        page.verdict(verdict.holds, verdict.claim)
    page.text(
        f"A bag-of-words classifier trained on the training templates labels {result.baseline['word_accuracy']:.3f} "
        "of the held-out words like their span (balanced over labels). It stands here for comparison, not as a bar.",
        quiet=True,
    )


def _routing(page: Page, result: DemoResult) -> None:
    assert result.routing is not None and result.control is not None
    page.section("Routing")
    page.html(
        figure_html(
            result.routing.plot(),
            "Left: share of answer tokens whose first choice is the expert, for each layer. Right: label of the token "
            "against the expert it was routed to, mean over all layers. Held-out templates.",
        )
    )
    page.html(
        figure_html(
            accuracy_figure({"MiCRo": result.routing, "random labels": result.control}),
            "Share of answer tokens routed to the expert of their label, balanced over labels, for each layer.",
        )
    )
    page.html(table_html(result.routing.table()))


def _tokens(page: Page, result: DemoResult) -> None:
    page.section("Tokens")
    page.text(
        "Held-out answers, teacher-forced, then answers that the model wrote itself. The slider goes through the "
        "layers; its left end is the vote of all layers. Hover or tab to a token for its probabilities. Prompts are "
        "pale; a line above a token has the colour of its label."
    )
    page.html(token_views_html([*result.views, *result.generated]), style=STYLE)


def _ablation(page: Page, result: DemoResult) -> None:
    assert result.ablation is not None and result.control_ablation is not None
    page.section("Ablation")
    page.html(
        figure_html(
            result.ablation.plot(),
            "Rise of the loss on the tokens of each domain when one expert is removed in all layers; the tokens are "
            "re-routed to the remaining experts.",
        )
    )
    page.text("Loss, nats per token:")
    page.html(table_html(result.ablation.table()))
    page.text("The same for the control trained with random labels:")
    page.html(table_html(result.control_ablation.table()))


def _steering(page: Page, result: DemoResult) -> None:
    import pandas as pd

    page.section("Steering")
    page.text(
        "The same prompts under four settings in one batch. Steering to a domain keeps that domain's expert and "
        "language, and removes the other two for the whole call."
    )
    rows = [{"prompt": s.prompt, **s.answers} for s in result.steered]
    page.html(table_html(pd.DataFrame(rows)))


def _training(page: Page, result: DemoResult) -> None:
    page.section("Training")
    for name, lines in result.metrics.items():
        if lines:
            page.html(figure_html(loss_figure(lines), f"Language-modelling loss of each optimizer step: {name}."))


def _method(page: Page, result: DemoResult) -> None:
    plan = result.plan
    page.section("Method and limits")
    page.html(table_html(_settings(result)))
    page.text(
        "The routers get the language-modelling loss alone; labels are used in stage 1 only. The control is the same "
        f"run with a random expert per token in stage 1, stopped after {plan.control_induce_steps} and "
        f"{plan.control_calibrate_steps} steps of stages 1 and 2 and without stage 3."
    )
    page.text(
        "All text comes from templates, not from people or models; the pretrained weights were quantised to 4 bits "
        "before upcycling. So this page shows that the method works end to end on a real backbone; it is not a "
        "benchmark. Usage is not importance: only the ablations say what an expert does."
    )


def _settings(result: DemoResult) -> pd.DataFrame:
    import pandas as pd

    plan = result.plan
    rows: list[tuple[str, Any]] = [
        ("upcycling: largest difference of logits from the dense model", f"{result.receipt['max_abs_diff']:.3g}"),
        ("parameters", f"{result.receipt['parameters']:,}"),
        ("precision", plan.precision),
        ("sequences per step, tokens at most", f"{plan.rows} x {plan.max_length}"),
        ("stage 1, experts by label", f"{plan.induce.steps} steps, rate {plan.induce.learning_rate:g}"),
        ("stage 2, routers, top-2", f"{plan.calibrate.steps} steps, rate {plan.calibrate.learning_rate:g}"),
        ("stage 3, everything, top-1, chat", f"{plan.finish.steps} steps, rate {plan.finish.learning_rate:g}"),
        ("training answers, held-out answers", f"{plan.train_records}, {plan.test_records}"),
        *((f"seconds: {name}", f"{seconds:.0f}") for name, seconds in result.seconds.items()),
        ("peak memory", f"{result.peak_memory_gb:.1f} GB"),
    ]
    return pd.DataFrame(rows, columns=["setting", "value"])
