"""What the settings of a run come to: none does nothing, or something else, without a word.

    refuse_conflicts   from the flags alone, when they are read
    effects            from the flags and the sizes of the run, before its first step

The rule: a flag that is given has an effect in this run, or is refused. A setting with which the
method that was asked for does not happen is refused. One that the size of the data or of the run
cuts short is said, in one line. tests/test_settings.py tries every flag.

    batches     of --batch-size examples, in one epoch
    per_epoch   optimizer steps in one epoch, over --accumulate batches each
    steps       optimizer steps in the whole run

What this file does not do: know which values a flag has (flags.py), print (train.py).
"""

import math
import types

import allocate
import lora
import proxies
from relatives import rank_scores
from relatives.incompatible import refuse_incompatible
from support import large, tasks

EPSILON = 1e-8  # of AdamW, beside the root of the second moment

# ------------------------------------------------------------------------------------- flags alone


def refuse_conflicts(given, args):
    """Flags that contradict each other, or would do nothing, are refused rather than ignored.

    Args:
        given: dict of the flags that the command line names; empty for a run that is resumed.
        args: dict of all flags.

    Raises:
        ValueError: the first conflict, in one line.
    """
    a = types.SimpleNamespace(**args)
    for flags, has, what in needs(a):
        useless = [f for f in flags.split() if f in given]
        if useless and not has:
            raise ValueError(f"--{useless[0].replace('_', '-')} needs {what}")
    if "keep" in given and a.budget_params is not None:
        raise ValueError("--keep and --budget-params are two budgets: give one")
    for wrong, message in (*contradictions(a), *of_training(a), *of_large(a)):
        if wrong:
            raise ValueError(message)
    refuse_incompatible(args)


def needs(a):
    """(flags, whether the run has what they are about, what that is): useless without it."""
    allocates, shortcuts = a.allocate in ("static", "dynamic"), a.shortcuts != "none"
    modules = a.targets or shortcuts
    reads_data = a.proxy not in (*allocate.BASELINES, *proxies.WITHOUT_DATA)
    other = a.allocate not in ("none", "static", "dynamic")
    why = f"{a.allocate} has a rule and a budget of its own" if other else "nothing is allocated"
    allocation = f"--allocate static or dynamic: {why}"
    return (
        ("keep", allocates or a.allocate == "adalora", allocation),
        ("score_batches", allocates or a.allocate == "alora", allocation),
        ("budget_params per_rank proxy ranking", allocates, allocation),
        ("when_off", allocates or not other, allocation),
        (
            "when_off",
            a.allocate != "none",
            "--allocate dynamic: else nothing that learned goes off",
        ),
        ("every", a.allocate not in ("none", "static"), "--allocate dynamic: what chooses again"),
        (
            "score_batches",
            reads_data or not allocates,
            f"a --proxy that reads batches: {a.proxy} does not",
        ),
        ("ranking", a.budget_params is None, "--keep: --budget-params knows one ranking alone"),
        (
            "ranking",
            a.targets and shortcuts,
            "both --targets and --shortcuts: one kind is one ranking",
        ),
        ("r", modules, "--targets or --shortcuts: no module has it"),
        ("lora_dropout", modules or not a.lora_dropout, "--targets or --shortcuts"),
        ("lora_alpha", a.targets, "--targets: shortcuts have --shortcut-alpha"),
        ("shortcut_alpha", shortcuts, "--shortcuts: no module has it"),
        ("delta_start delta_lazy", a.delta_ratio != 0, "--delta-ratio other than 0"),
    )


def contradictions(a):
    """(whether, message) of values that exclude each other, or undo a method."""
    modules = a.targets or a.shortcuts != "none"
    single = a.budget_params and a.proxy in rank_scores.CHOICES
    cross = set(lora.SHORTCUTS[a.shortcuts]) & set(lora.CROSS)
    no_branch = "0 multiplies every module by 0: they would compute nothing"
    return (
        (
            a.allocate != "none" and not modules,
            f"--allocate {a.allocate} needs modules: give --targets or --shortcuts",
        ),
        (
            a.per_rank == "yes" and not single,
            "--per-rank yes needs --budget-params N and a --proxy out of "
            f"{', '.join(rank_scores.CHOICES)}",
        ),
        (
            a.when_off == "frozen" and a.allocate != "dynamic",
            "--when-off frozen needs --allocate dynamic: else nothing that has learned goes off",
        ),
        (
            a.per_rank == "yes" and a.allocate == "dynamic" and a.optimizer != "adamw",
            f"--optimizer {a.optimizer} does not go with single ranks that go on and off: each has "
            "moments of its own, which AdamW alone keeps",
        ),
        (
            tasks.TASKS[a.task].head == "lm" and not modules and not a.eval_only,
            "--targets none --shortcuts none: a language model has no head that would train",
        ),
        (a.targets and a.lora_alpha == 0, f"--lora-alpha {no_branch}"),
        (a.shortcuts != "none" and a.shortcut_alpha == 0, f"--shortcut-alpha {no_branch}"),
        (
            a.shortcut_norm == "reuse" and not cross,
            "--shortcut-norm reuse needs --shortcuts cross or all: it follows those alone",
        ),
    )


def of_training(a):
    """(whether, message) as contradictions, of Delta-LoRA and of the optimizer's settings."""
    delta, reads_weights = a.delta_ratio != 0, a.proxy in large.READ_WEIGHTS
    lazy = delta and a.delta_lazy == "yes"
    return (
        (
            delta and not a.targets,
            "--delta-ratio needs --targets: shortcuts have no weight to move",
        ),
        (
            delta and a.lora_dropout,
            "--delta-ratio needs --lora-dropout 0: dropout breaks dL/d(BA) = s dL/dW",
        ),
        (
            # W_T + s P_T = W_0 + (1 + lambda) s P_T - lambda s P_{K+1}
            a.delta_ratio == -1,
            "--delta-ratio -1 takes out of the weights what B A adds: no module would learn",
        ),
        (
            lazy and a.allocate != "none" and reads_weights,
            f"--proxy {a.proxy} reads the weights, which --delta-lazy leaves behind",
        ),
        (a.lr == 0, "--lr 0 trains nothing: give a number above 0"),
        (
            # p <- (1 - lr wd) p - lr …
            a.lr * a.weight_decay >= 1,
            f"--lr {a.lr:g} times --weight-decay {a.weight_decay:g} is 1 or more: each step would "
            "erase every parameter",
        ),
        (
            0 < a.clip < EPSILON,
            f"--clip {a.clip:g} is below AdamW's epsilon {EPSILON:g}, which would swallow every "
            "step; 0 = no clipping",
        ),
    )


def of_large(a):
    """(whether, message) as contradictions, of a base in 16 bits or one that is sharded."""
    moves = a.delta_ratio != 0 and a.delta_lazy == "no"
    scored = a.allocate in ("static", "dynamic") and a.proxy in large.READ_WHOLE
    return (
        (
            moves and a.base_dtype == "bf16",
            "--delta-ratio with --base-dtype bf16 needs --delta-lazy yes: a weight in bfloat16 "
            "would round most of each increment away",
        ),
        (
            moves and a.shard == "yes",
            "--delta-ratio with --shard yes needs --delta-lazy yes: no process has a whole weight "
            "that it could move",
        ),
        (
            a.shard == "yes" and scored,
            f"--proxy {a.proxy} does not go with --shard yes: {large.READ_WHOLE.get(a.proxy)}",
        ),
    )


# ------------------------------------------------------------------------------- with sizes, before


def effects(args, *, examples, parameters, plan=None):
    """What the sizes of a run make of its settings.

    Args:
        args: the flags.
        examples: int, of the training set. parameters: int, that train.
        plan: allocate.Reallocator, or None where nothing is allocated.

    Returns:
        list of lines for the person who starts the run.

    Raises:
        ValueError: with this many steps the method would not happen.
    """
    batches = math.ceil(examples / args.batch_size)
    per_epoch = math.ceil(batches / args.accumulate)
    steps = per_epoch * args.epochs
    if args.delta_ratio and args.delta_start + 2 > steps:
        # W first moves after step K + 2
        raise ValueError(
            f"--delta-start {args.delta_start} is beyond this run: the weights would first move "
            f"after step {args.delta_start + 2} of {steps}, and it would be plain LoRA; give "
            f"{steps - 2} at most, or more --epochs"
        )
    if args.warmup and steps == 1:
        raise ValueError(
            f"--warmup {args.warmup}: the run has one step, and its rate would be 0: "
            "give --warmup 0"
        )
    rows = about_training(args, examples, batches, parameters, steps)
    if plan:
        rows += about_allocation(args, examples, per_epoch, plan)
    elif args.allocate != "none":
        rows += about_allocator(args, examples, per_epoch)
    return [line for so, line in rows if so]


def about_training(a, examples, batches, parameters, steps):
    """[(whether it is so, what is said)] of data, steps and rates."""
    scale = (1 + a.delta_ratio) * a.lora_alpha / a.r
    return [
        (
            a.batch_size > examples,
            f"--batch-size {a.batch_size}: the training set has {examples} examples, one batch",
        ),
        (
            a.accumulate > 1 and a.accumulate >= batches,
            f"--accumulate {a.accumulate}: an epoch has {batches} batches, one step each epoch",
        ),
        (
            a.warmup >= steps,
            f"--warmup {a.warmup} is as long as the run, {steps} steps: the learning rate ends at "
            f"{a.lr * (steps - 1) / max(1, a.warmup):.2g}, not {a.lr:g}",
        ),
        (
            a.lr * steps < 1e-6,
            f"--lr {a.lr:g} times {steps} steps is {a.lr * steps:.1g}: hardly anything will move",
        ),
        (
            a.lr * a.weight_decay >= 0.1,
            f"--weight-decay {a.weight_decay:g}: each step takes {a.lr * a.weight_decay:.0%} off "
            "every parameter",
        ),
        (
            # an entry of the clipped gradient is clip / sqrt(parameters) in the mean
            0 < a.clip < EPSILON * math.sqrt(parameters),
            f"--clip {a.clip:g}, over {parameters:,} parameters, is less than AdamW's epsilon in "
            "each: steps are shorter than --lr",
        ),
        (
            abs(a.delta_ratio) > 100,
            f"--delta-ratio {a.delta_ratio:g}: B A counts {scale:.3g} times in the end, in place "
            f"of {a.lora_alpha / a.r:g}",
        ),
        (
            a.optimizer == "lora_rite"
            and a.batch_size * a.accumulate < a.r
            and tasks.TASKS[a.task].head != "lm",  # where every token is read
            f"--optimizer lora_rite: a step's {a.batch_size * a.accumulate} examples are "
            f"{a.batch_size * a.accumulate} tokens where the last block is read, less than r "
            f"{a.r}: along the directions that they leave open the step has no gradient",
        ),
        (
            a.log_every > steps,
            f"--log-every {a.log_every}: the run has {steps} steps, no train line is logged",
        ),
    ]


def about_allocation(a, examples, per_epoch, plan):
    """[(whether it is so, what is said)] of scores, budget and schedule."""
    asked = a.score_batches * a.batch_size
    everything = sum(plan.costs.values())
    if a.budget_params is None:
        whole = sum(allocate.keep_counts(plan.costs, a.keep)) == len(plan.costs)
    else:
        whole = a.budget_params >= everything
    budget = f"keep {a.keep:g}" if a.budget_params is None else f"budget-params {a.budget_params}"
    due = sum(plan.due(1, step, per_epoch) for step in range(per_epoch))
    reads_data = a.proxy not in (*allocate.BASELINES, *proxies.WITHOUT_DATA)
    dynamic = a.allocate == "dynamic"
    return [
        (
            reads_data and asked > examples,
            f"--score-batches {a.score_batches}, {asked:,} examples: the training set has "
            f"{examples}, all of them are scored",
        ),
        (whole, f"--{budget}: all {len(plan.costs)} modules fit, {a.proxy} chooses nothing"),
        (
            dynamic and due * a.epochs == 1,
            f"--every {a.every:g}: the run has one decision, dynamic is static here",
        ),
        (
            dynamic and a.every * per_epoch < 1,
            f"--every {a.every:g} is less than a step: a decision before each of {per_epoch} steps "
            "an epoch",
        ),
    ]


def about_allocator(a, examples, per_epoch):
    """The same of a relative that allocates ranks by a rule of its own."""
    asked = a.score_batches * a.batch_size
    return [
        (
            a.allocate == "alora" and asked > examples,
            f"--score-batches {a.score_batches}, {asked:,} examples: the training set has "
            f"{examples}, importance is measured on all of them",
        ),
        (a.allocate == "adalora" and a.keep == 1, "--keep 1: adalora takes no triplet out"),
        (
            a.every * per_epoch < 1,
            f"--every {a.every:g} is less than a step: a decision after each of {per_epoch} steps "
            "an epoch",
        ),
    ]
