"""Judge LoRA Without Regret (Schulman et al. 2025) claim by claim on comparable runs.

A claim holds, does not hold, or cannot be told.
"""

from __future__ import annotations

from analysis.claims import cost, curves, matching, rates
from analysis.claims.claim import Claim, JudgedClaim, with_holm
from analysis.claims.evidence import Evidence, gather
from analysis.data.tables import Tables
from analysis.stats.effects import holm

_BY_RANK, _PLACEMENT, _ALPHA, _BATCH = "lr_by_rank", "placement", "alpha", "batch_size"

CLAIMS: dict[str, Claim] = {
    claim.id: claim
    for claim in (
        Claim("1a", "Rank 1 reaches full fine-tuning's score", _BY_RANK, matching.rank_one_reaches),
        Claim(
            "1b",
            "Rank 1's basin of good learning rates is wider than full fine-tuning's",
            _BY_RANK,
            matching.rank_one_is_wider,
        ),
        Claim(
            "2a",
            "The best learning rate hardly depends on rank, with alpha fixed",
            _BY_RANK,
            rates.hardly_depends_on_rank,
        ),
        Claim(
            "2b",
            "Rank 1's best learning rate is lower than higher ranks'",
            _BY_RANK,
            rates.lower_at_rank_one,
        ),
        Claim(
            "2c",
            "With alpha in proportion to rank (alpha = 2r) the best learning rate is not "
            "invariant: it falls with rank",
            _ALPHA,
            rates.alpha_with_rank_is_not_invariant,
        ),
        Claim(
            "3",
            "LoRA's best learning rate is about 10 times full fine-tuning's",
            _BY_RANK,
            rates.ten_times_full,
        ),
        Claim(
            "4a",
            "Attention-only LoRA is worse than MLP-only at equal parameters",
            _PLACEMENT,
            matching.attention_is_worse,
        ),
        Claim(
            "4b",
            "LoRA on all layers is about as good as MLP-only",
            _PLACEMENT,
            matching.all_is_like_mlp,
        ),
        Claim(
            "5",
            "Large batches hurt LoRA more than full fine-tuning, at every rank",
            _BATCH,
            matching.large_batches_hurt,
        ),
        Claim(
            "6",
            "Early training curves are the same for all ranks",
            _BY_RANK,
            curves.early_curves_agree,
        ),
        Claim(
            "7",
            "A training pass takes about 2/3 of full fine-tuning's FLOPs",
            _BY_RANK,
            cost.two_thirds_of_the_flops,
        ),
        Claim(
            "8",
            "Adapters that can hold a bit an episode are as good as larger ones",
            _BY_RANK,
            matching.capacity_is_spare,
        ),
        Claim(
            "9",
            "The rule 5e-5 · 10 · (2000/hidden)^p gives the best LoRA learning rate",
            _BY_RANK,
            rates.rule_is_right,
        ),
    )
}


def judge(evidence: Evidence | None) -> list[JudgedClaim]:
    """Judge every claim in order, with p-values corrected for multiple tests (Holm)."""
    judged = [claim.verdict(evidence) for claim in CLAIMS.values()]
    # Claim 7 is arithmetic and no test, so it is left out.
    tested = {claim.id: claim.p for claim in judged if claim.p is not None and claim.id != "7"}
    return with_holm(judged, dict(zip(tested, holm(list(tested.values())), strict=True)))


def judge_tables(tables: Tables, context: str | None = None) -> list[JudgedClaim]:
    """Judge every claim on the runs of a context, by default the one with most runs."""
    return judge(gather(tables.runs, tables.steps, context))
