"""Wrong variants, each of which some test must notice: python tests/mutants.py [WORD …]

Each mutant is one edit of a source file. It is applied to a copy of the project, the tests that concern it are run, and it
is killed if one fails. With words, only mutants whose description or file holds one of them. Exit code 1 if one
survives, if an edit no longer fits its file, or if its tests could not be run.

    python tests/mutants.py                                       those of the list below: the formulas and rules
    python tests/mutants.py --systematic [--sample N] [--seed S]  every small edit (drawn_mutants.py) of the six root files

Of those that are drawn some compute the same as the source: they stand in survivors.txt, each with the reason, and are
not run. Exit code 1 if another one survives. All of them take hours: with --record FILE they can be interrupted.

Torch is loaded once; every mutant is tested in a process that is forked from here.
"""

import argparse
import collections
import gc
import importlib.metadata
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a pool of threads does not survive a fork

import hypothesis  # noqa: F401  what the tests would load, each for itself
import matplotlib.pyplot  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import tokenizers  # noqa: F401
import torch

import drawn_mutants

ROOT = Path(__file__).parents[1]
LORA, SHORTCUTS = "test_lora.py", "test_shortcuts.py"
PROXIES, ALLOCATE, HETERO = "test_proxies.py", "test_allocate.py", "test_hetero.py"
DELTA, MODEL, TRAIN = "test_delta_lora.py", "test_model.py", "test_train.py"
WHEN_OFF, RANKS = "test_when_off.py", "test_single_ranks.py"
RELATIVES1 = "test_relatives_adapters1.py"
FAULTS, DISTRIBUTED = "test_faults.py", "test_distributed.py"
PEFT, ORACLE = "test_peft.py", "test_oracle.py"
COMPARE, BENCH = "test_compare.py", "test_bench.py"
CAUSAL, GENERATION, GGUF = "test_causal.py", "test_generation.py", "test_gguf.py"
LANGUAGE = "test_language_model.py"
FOLDER, READERS = "test_hf_folder.py", "test_readers.py"
ADAPTERS2 = "test_relatives_adapters2.py"
SETTINGS, DOORS, GLUE = "test_settings.py", "test_doors.py", "test_glue.py"
TEXTS, TEXT_RUNS = "test_texts.py", "test_text_runs.py"
LARGE = "test_large.py"
DEFAULTS = "test_defaults.py"
RULES, ALLOCATORS = "test_relatives_optimizers.py", "test_relatives_allocators.py"
SURVIVORS = ROOT / "tests" / "survivors.txt"
# Of the processor, for the tests of one mutant; all tests may take five times as many.
SECONDS = 120
MEMORY = 2**33  # bytes: what grows without end fails in its process, and disturbs no other
WAIT = 5  # seconds of the clock for each of these, as other programs run too

CONCERNED = {  # root file -> tests of what is drawn from it, the likeliest to notice first
    "model.py": [MODEL, CAUSAL, DEFAULTS, SHORTCUTS, FOLDER, GENERATION, DOORS, TRAIN],
    "lora.py": [LORA, DEFAULTS, SHORTCUTS, HETERO, WHEN_OFF, DOORS, RANKS, DELTA],
    "proxies.py": [PROXIES, DOORS, SETTINGS, HETERO],
    "allocate.py": [ALLOCATE, HETERO, RANKS, TRAIN],
    "delta_lora.py": [DELTA, WHEN_OFF, RANKS],
    "train.py": [TRAIN, HETERO, DOORS, ALLOCATORS, DELTA, RANKS, SETTINGS, DISTRIBUTED],
}
# Not of what the code does.
SKIPPED = (
    "test_docs.py",
    "test_exercises.py",
    "test_drawn_mutants.py",
)


class Job(NamedTuple):
    """A file's whole source, the tests (files, or file::test) it has to meet, and what it is."""

    file: str
    source: str
    tests: list
    about: object
    seconds: int = SECONDS


# fmt: off
MUTANTS = [  # (file, old, new, what is wrong, tests)
    # ------------------------------------------------------------------------------------ lora.py
    ("lora.py", "= lora_alpha / r\n", "= lora_alpha\n", "scale alpha instead of alpha / r", f"{LORA}::test_forward_and_gradients_in_closed_form"),
    ("lora.py", "= lora_alpha / r\n", "= lora_alpha / r**0.5\n", "scale of rsLoRA", f"{LORA}::test_forward_and_gradients_in_closed_form"),
    ("lora.py", "self.scaling * B)  # (…", "B)  # (…", "forward without the scale", f"{LORA}::test_forward_and_gradients_in_closed_form"),
    ("lora.py", "return self.scaling * (B", "return 1.0 * (B", "delta_w without the scale", f"{LORA}::test_delta_w_entry_by_entry"),
    ("lora.py", "bound = in_features**-0.5", "bound = out_features**-0.5", "A drawn by fan-out", f"{LORA}::test_initial_values"),
    ("lora.py", "(2 * uniform - 1) * bound", "uniform * bound", "A drawn from (0, bound)", f"{LORA}::test_initial_values"),
    ("lora.py", 'f"lora_A/{name}"', 'f"lora_A/{name.rpartition(chr(46))[2]}"', "A the same in every layer", f"{LORA}::test_initial_a_depends_on_seed_and_name_alone"),
    ("lora.py", "if self.merged or not self.in_forward:", "if self.merged:", "off modules stay in", f"{LORA}::test_off_means_off"),
    ("lora.py", "layer.base.weight += layer.delta_w()", "layer.base.weight += layer.delta_w() / layer.scaling", "merge without the scale", f"{LORA}::test_merge_keeps_the_logits_and_unmerge_the_bits"),
    ("lora.py", "copy_(layer.weight_before_merge)", "sub_(layer.delta_w())", "unmerge by subtraction", f"{LORA}::test_merge_keeps_the_logits_and_unmerge_the_bits"),
    ("lora.py", "if a.in_forward and isinstance(a.base, nn.Linear)}", "if isinstance(a.base, nn.Linear)}", "merge takes modules that are off", f"{LORA}::test_merge_keeps_the_logits_and_unmerge_the_bits"),
    ("lora.py", "    model.requires_grad_(False)\n    for", "    for", "nothing is frozen", f"{LORA}::test_trainable_set_and_counts"),
    ("relatives/single_ranks.py", "layer.lora_alpha = layer.scaling * layer.r", "layer.scaling = layer.lora_alpha / layer.r", "fewer ranks change the scale", f"{HETERO}::test_ranks_within_a_budget"),
    ("relatives/single_ranks.py", "lora_B.detach()[:, kept]", "lora_B.detach()[:, : len(kept)]", "kept rows of A with other columns of B", f"{HETERO}::test_kept_ranks_compute_what_they_did"),
    ('lora.py', '(LoRALayer, shortcut_alpha)', '(LoRALayer, lora_alpha)', "shortcuts with the modules' alpha", f"{SHORTCUTS}::test_number_of_shortcuts"),
    # -------------------------------------------------------------------- model.py: attention, shortcuts
    ("model.py", "x = self.residual_1(sa_input) + self.drop(h)", "x = self.residual_1(h) + self.drop(sa_input)", "residual_1 on the wrong summand", f"{SHORTCUTS}::test_forward_equals_dense_matrices"),
    ("model.py", "x = self.residual_2(ffn_input)", "x = self.residual_2(sa_input)", "residual_2 around both sub-layers", f"{SHORTCUTS}::test_forward_equals_dense_matrices"),
    ("model.py", "self.shortcut_sa, sa_input, self.ffn_norm)", "self.shortcut_sa, ffn_input, self.ffn_norm)", "shortcut_sa from the FFN's input", f"{SHORTCUTS}::test_forward_equals_dense_matrices"),
    ("model.py", "self.shortcut_ffn, previous_ffn_input, self.attn_norm)", "self.shortcut_ffn, sa_input, self.attn_norm)", "shortcut_ffn from this block", f"{SHORTCUTS}::test_forward_equals_dense_matrices"),
    ("model.py", "return norm(x) if self.config", "return norm(norm(x)) if self.config", "reuse normalises twice", f"{SHORTCUTS}::test_forward_equals_dense_matrices"),
    ("model.py", "        return norm(x) if self.config.shortcut_norm", "        return norm(x) if shortcut.in_forward and self.config.shortcut_norm", "reuse only where the shortcut is on", f"{SHORTCUTS}::test_forward_equals_dense_matrices"),
    ("model.py", "is_causal=causal,", "is_causal=False,", "every token sees the future", f"{MODEL}::test_logits_equal_the_dense_derivation"),
    ("model.py", "mask = None if causal else key_mask", "mask = None", "padding is attended to", f"{MODEL}::test_logits_equal_the_dense_derivation"),
    ("model.py", "        return q, k, self.split_heads(", "        return q * 0.5, k, self.split_heads(", "attention scaled twice", f"{MODEL}::test_logits_equal_the_dense_derivation"),
    ("model.py", "read = mask.sum(1) - 1", "read = mask.sum(1) - 1 - (mask.sum(1) > 1).long()", "the last token but one is read", f"{MODEL}::test_logits_equal_the_dense_derivation"),
    ("model.py", ", labels[:, 1:][labels[:, 1:] != -100]", ", labels[:, :-1][labels[:, 1:] != -100]", "language model not shifted", f"{MODEL}::test_losses"),
    ("model.py", "return x[:, :-1][labels[:, 1:] != -100]", "return x[:, :-1][labels[:, :-1] != -100]", "logits where the token itself has a label", f"{MODEL}::test_language_model_loss_is_of_the_labelled_tokens_alone"),
    ("model.py", "labels is not None and self.training:", "labels is not None and False:", "in training logits of every token", f"{MODEL}::test_language_model_loss_is_of_the_labelled_tokens_alone"),
    ("model.py", "self.position_embeddings(positions + c.position_offset)", "self.position_embeddings(positions)", "positions without the offset", f"{MODEL}::test_logits_equal_the_dense_derivation"),
    # --------------------------------------------------------------------------------- proxies.py
    ("proxies.py", "(once * loss_terms(model, batch) / total)\n        gradients", "once\n        gradients", "gradients summed over batches", f"{PROXIES}::test_slot_scores_are_those_of_the_dense_matrix"),
    ('proxies.py', 'sum(g.norm() for _, g in found).item()', 'sum(g.norm() ** 2 for _, g in found).sqrt().item()', "grad_norm: the norm of both", f"{PROXIES}::test_grad_norm_and_snip_by_finite_differences"),
    ('proxies.py', 'sum(g.norm() for _, g in found).item()', 'sum(g.norm() ** 2 for _, g in found).item()', "grad_norm squared", f"{PROXIES}::test_grad_norm_and_snip_by_finite_differences"),
    ('proxies.py', 'sum((p * g).abs().sum() for p, g in found)', 'sum((p * g).sum().abs() for p, g in found)', "snip: absolute value of the sum", f"{PROXIES}::test_grad_norm_and_snip_by_finite_differences"),
    ('proxies.py', 'sum((p * g).abs().sum() for p, g in found)', 'sum((p * g).abs().sum() for p, g in found[:1])', "snip without B", f"{PROXIES}::test_grad_norm_and_snip_by_finite_differences"),
    ("proxies.py", "parameter.data.abs_()", "parameter.data.neg_()", "synflow without absolute values", f"{PROXIES}::test_synflow_by_finite_differences"),
    ("proxies.py", "        block.attn_norm = block.ffn_norm = nn.Identity()\n", "", "synflow with LayerNorm", f"{PROXIES}::test_synflow_conserves_and_reaches_everything"),
    ("proxies.py", "weight_one(s) @ v", "weight_one(s.detach()) @ v", "synflow: no flow through q and k", f"{PROXIES}::test_exactly_zero_at_b_zero_and_said"),
    ("proxies.py", "    model.final_norm = nn.Identity()\n", "", "synflow with the last LayerNorm", f"{PROXIES}::test_synflow_conserves_and_reaches_everything"),
    ("proxies.py", "[(p.detach() * h).sum().item() for", "[-(p.detach() * h).sum().item() for", "grasp with the other sign", f"{PROXIES}::test_what_lives_at_b_zero"),
    ("proxies.py", "total / 2 / count", "total / count", "fisher without the half", f"{PROXIES}::test_fisher_by_removing_channels"),
    ("proxies.py", "(a * g).sum(1).square().sum()", "(a * g).square().sum()", "fisher: squares before the sum", f"{PROXIES}::test_fisher_by_removing_channels"),
    ("proxies.py", "high = middle\n", "high = middle - 1\n", "alpha: wrong binary search", f"{PROXIES}::test_binary_search_finds_the_smallest_alpha"),
    ("proxies.py", "(1 - ALPHA_TOLERANCE) *", "1.0 *", "alpha: no tolerance", f"{PROXIES}::test_alpha_test_keeps_99_percent_of_accuracy"),
    ("proxies.py", "a * h if whole else h", "h", "released alpha does not scale the layer", f"{PROXIES}::test_alpha_scales_the_branch_or_as_released_the_layer"),
    ("proxies.py", "(eye * residual)", "(eye * 1.0)", "slot of a cross shortcut taken for an identity", f"{PROXIES}::test_slot_scores_are_those_of_the_dense_matrix"),
    ("proxies.py", "(w * g).abs().sum().item()", "(w * g).sum().abs().item()", "snip_slot: absolute value of the sum", f"{PROXIES}::test_slot_scores_are_those_of_the_dense_matrix"),
    ("proxies.py", "            layer.enabled, layer.ranks_off = on[name]\n", "            pass\n", "scoring leaves everything on", f"{PROXIES}::test_nothing_is_left_behind"),
    ("proxies.py", "            module.training = mode\n", "            pass\n", "scoring leaves eval mode", f"{PROXIES}::test_nothing_is_left_behind"),
    ("proxies.py", "                layer.base = bases[name]\n", "                pass\n", "slots leave dense bases behind", f"{PROXIES}::test_nothing_is_left_behind"),
    ('relatives/rank_scores.py', 'a.norm(dim=1) + b.norm(dim=0)', 'a.norm(dim=1) + b.norm()', "rank scores share B's whole norm", f"{PROXIES}::test_rank_scores_are_those_of_the_rows_and_columns"),
    # -------------------------------------------------------------------------------- allocate.py
    ('allocate.py', 'math.floor(round(keep * n_l, 9))', 'round(round(keep * n_l, 9))', "round for modules", f"{ALLOCATE}::test_counts_are_floor_for_modules_and_round_for_shortcuts"),
    ('allocate.py', 'round(round(keep * n_s, 9))', 'math.floor(round(keep * n_s, 9))', "floor for shortcuts", f"{ALLOCATE}::test_counts_are_floor_for_modules_and_round_for_shortcuts"),
    ("allocate.py", "sorted(scores.values(), reverse=True)", "sorted(scores.values())", "the worst are kept", f"{ALLOCATE}::test_counts_are_floor_for_modules_and_round_for_shortcuts"),
    ("allocate.py", "set(shuffled(tied, generator)[", "set(sorted(tied)[", "ties by name", f"{ALLOCATE}::test_ties_at_the_cut_are_uniform_and_the_rest_is_fixed"),
    ("allocate.py", "names = sorted(names)\n", "names = list(names)\n", "ties depend on the order of names", f"{ALLOCATE}::test_ties_do_not_depend_on_the_order_of_the_names"),
    ("allocate.py", "np.flatnonzero(new_w <= budget)", "np.flatnonzero(new_w < budget)", "a budget that is met exactly is refused", f"{ALLOCATE}::test_the_chosen_set_is_the_best_there_is"),
    ("allocate.py", "np.argsort(-values / weights", "np.argsort(-values * weights", "items by value times weight", f"{ALLOCATE}::test_the_chosen_set_is_the_best_there_is"),
    ("allocate.py", "upper = lower + (reach - sum_w[stop]) * per_weight[stop]", "upper = lower", "no bound for the fractional part", f"{ALLOCATE}::test_the_chosen_set_is_the_best_there_is"),
    ("allocate.py", 'np.searchsorted(sum_w, reach, side="right") - 1', 'np.searchsorted(sum_w, reach, side="right").clip(max=len(v))', "an item that does not fit counts whole", f"{ALLOCATE}::test_the_chosen_set_is_the_best_there_is"),
    ("allocate.py", "sorted(useful or order, key", "sorted(useful, key", "nothing is on where the one good module is too large", f"{ALLOCATE}::test_of_what_fits_some_is_chosen_where_the_only_positive_score_is_too_large"),
    ("allocate.py", "if taken[state]:", "if not taken[state]:", "the complement is chosen", f"{ALLOCATE}::test_the_chosen_set_is_the_best_there_is"),
    ("allocate.py", "state = int(before[state])", "state = 0", "the way back through the states is lost", f"{ALLOCATE}::test_the_chosen_set_is_the_best_there_is"),
    ('allocate.py', 'return max(1, math.ceil(exact))', 'return max(1, math.floor(exact))', "interval rounded down", f"{ALLOCATE}::test_dynamic_schedule_counts_inside_each_epoch"),
    ("allocate.py", "return step_in_epoch %", "return step %", "steps counted over epochs", f"{ALLOCATE}::test_dynamic_schedule_counts_inside_each_epoch"),
    ('allocate.py', 'round(every * steps_per_epoch, 9)', 'every * steps_per_epoch', "0.07 * 100 is more than 7", f"{ALLOCATE}::test_dynamic_schedule_counts_inside_each_epoch"),
    # ------------------------------------------------------------------------------ delta_lora.py
    ("delta_lora.py", "total += c * other_c * inner", "total += c * inner", "weight_change: one of the two scales", f"{DELTA}::test_weight_change_is_the_norm_of_what_the_weight_moved_by"),
    ("delta_lora.py", "math.sqrt(max(0.0, total))", "max(0.0, total)", "weight_change: squared", f"{DELTA}::test_weight_change_is_the_norm_of_what_the_weight_moved_by"),
    ("delta_lora.py", "[new_B, -old_B]", "[new_B, old_B]", "new plus old product", f"{DELTA}::test_update_entry_by_entry"),
    ("delta_lora.py", "[new_B, -old_B]", "[old_B, -new_B]", "old minus new product", f"{DELTA}::test_update_entry_by_entry"),
    ("delta_lora.py", "right = torch.cat([new_A, old_A], dim=0)", "right = torch.cat([new_A - old_A, new_A - old_A], dim=0)", "second order: (dB)(dA)", f"{DELTA}::test_update_entry_by_entry"),
    ("delta_lora.py", "coefficient = self.ratio * self.scaling[name]\n            ", "coefficient = self.ratio\n            ", "lambda without the scale", f"{DELTA}::test_one_step_by_hand"),
    ("delta_lora.py", "coefficient = self.ratio * self.scaling[name]\n            ", "coefficient = self.ratio**2 * self.scaling[name]\n            ", "lambda squared", f"{DELTA}::test_one_step_by_hand"),
    ("delta_lora.py", "old_A, old_B, coefficient)\n", "*self.pair(name), coefficient)\n", "copy taken after the step: no change", f"{DELTA}::test_one_step_by_hand"),
    ("delta_lora.py", "old_A, old_B, coefficient)\n", "0 * old_A, 0 * old_B, coefficient)\n", "whole product at every step", f"{DELTA}::test_weights_move_first_after_step_k_plus_2"),
    ("delta_lora.py", "elif self.t > self.start:", "elif self.t >= self.start:", "start one step early", f"{DELTA}::test_weights_move_first_after_step_k_plus_2"),
    ("delta_lora.py", "if not layer.enabled:\n                self.end", "if False:\n                self.end", "modules that are off are taken for on", f"{DELTA}::test_a_pair_redrawn_while_off_begins_anew"),
    ("delta_lora.py", "[(*end, 1), (*self.begin.pop(name), -1)]", "[(*end, 1)]", "a stretch without its beginning", f"{DELTA}::test_stretches_through_several_reallocations"),
    ("delta_lora.py", "self.begin.setdefault(name, self.old[name])", "self.begin[name] = self.old[name]", "every step begins a stretch", f"{DELTA}::test_lazy_mode_gives_the_same_losses"),
    ("delta_lora.py", "self.ratio * self.scaling[name]\n        return", "self.ratio * self.adapters[name].scaling\n        return", "alpha_test scales what the weight has gained", f"{DELTA}::test_alpha_test_scales_the_branch_alone_in_lazy_mode_too"),
    ("delta_lora.py", "combine([(*pair, layer.scaling), *terms])", "combine([(*pair, (1 + self.ratio) * layer.scaling), *terms])", "lambda counted twice in the export", f"{DELTA}::test_stretches_through_several_reallocations"),
    ("delta_lora.py", "exact_linear(thin, c * B)", "exact_linear(thin, B)", "lazy branch without lambda s", f"{DELTA}::test_lazy_mode_gives_the_same_losses"),
    ("support/large.py", "F.linear(x.to(weight.dtype), weight)", "F.linear(x, weight.to(x.dtype))", "the lazy change is rounded to its input's dtype", f"{LARGE}::test_a_small_change_survives_the_lazy_form"),
    ("delta_lora.py", "self.old[name] = tuple(p.clone() for p in self.pair(name))", "self.old[name] = tuple(p.clone() if name in self.begin else 0 * p for p in self.pair(name))", "whole product at the first step", f"{DELTA}::test_weights_move_first_after_step_k_plus_2"),
    ("delta_lora.py", "                delta_update_(weight", "                weight.mul_(0.999)\n                delta_update_(weight", "weights decay", f"{DELTA}::test_one_step_by_hand"),
    ("delta_lora.py", "        if lazy:\n", "        for layer in self.layers.values():\n            layer.register_forward_hook(lambda m, _x, _h: m.base.weight.data.add_(1e-4 * m.delta_w().data) is None or None)\n        if lazy:\n", "update in forward", f"{DELTA}::test_weights_move_first_after_step_k_plus_2"),
    # ----------------------------------------------------------------------------------- train.py
    ("train.py", "once * counted(examples) / total\n", "once / len(group)\n", "micro-batches weigh alike", f"{TRAIN}::test_accumulation_equals_one_large_batch"),
    ('train.py', 'lr * step / warmup', 'lr * (step + 1) / warmup', "warm-up starts above 0", f"{TRAIN}::test_learning_rates"),
    ("train.py", "if run.plan and run.plan.due(", "if run.plan and run.step == 0 and run.plan.due(", "dynamic is static", f"{HETERO}::test_dynamic_run_decides_on_schedule_and_within_budget"),
    ("train.py", "run.optimizer.zero_grad(set_to_none=True)", "run.optimizer.zero_grad(set_to_none=False)", "zero gradients move what is off", f"{HETERO}::test_on_off_on_keeps_weights_and_moments"),
    ('lora.py', 'layer.enabled = name in on', 'layer.enabled = name not in on', "the chosen are switched off", f"{HETERO}::test_dynamic_run_decides_on_schedule_and_within_budget"),
    ("support/checkpoint.py", '        torch.set_rng_state(state["generators"][rank]["cpu"])\n', "", "resumption forgets the RNG", f"{TRAIN}::test_an_interrupted_run_ends_with_the_same_bits"),
    ('support/checkpoint.py', 'lora.switch(model, {name for name, on in state["on"].items() if on})', 'lora.switch(model, set(state["on"]))', "resumption switches everything on", f"{HETERO}::test_resuming_through_a_reallocation_gives_the_same_bits"),
    ("train.py", "        rule.after_step()\n    run.opt", "        pass\n    run.opt", "weights never move", f"{DELTA}::test_once_per_optimizer_step_with_accumulation"),
    ("train.py", "        share.backward()\n", "        share.backward()\n        if run.delta:\n            run.delta.before_step(), run.delta.after_step()\n", "delta once per micro-batch", f"{DELTA}::test_once_per_optimizer_step_with_accumulation"),
    ('lora.py', 'if id(p) not in off}', '}', "what is off is exchanged too", f"{DISTRIBUTED}::test_two_processes_equal_one"),
    ("model.py", "masked_fill(~mask, -torch.inf)", "masked_fill(~mask, -1.0)", "padding is attended to a little", f"{MODEL}::test_logits_equal_the_dense_derivation"),
    # ------------------------------------------------------------------------- model folders, families
    ("model.py", "    hf_folder.check_sizes(tensors, config)\n", "", "sizes of config.json unchecked", f"{READERS}::test_sizes_that_no_tensor_confirms"),
    ("model.py", 'weight.dtype == torch.float16', 'weight.dtype == torch.float64', "float16 is computed with", f"{MODEL}::test_weights_that_cannot_be_computed_with"),
    ("model.py", "if not config.pooler_in_head:", "if config.pooler_in_head:", "BERT's own pooler is trained as head", f"{FOLDER}::test_pooler_that_came_is_backbone_and_a_fresh_one_is_head"),
    ("support/families.py", 'fields["pad_token_id"] + 1', 'fields["pad_token_id"]', "RoBERTa's positions from pad", f"{FOLDER}::test_roberta_layout_has_no_pooler_and_brings_an_lm_head"),
    ("support/families.py", 'fields["pre_ln"] and kept', 'kept', "a last norm in OPT-350M", f"{FOLDER}::test_config_fields_of_real_files"),
    ("support/families.py", 'first_eos),\n        "layer_norm_eps": Field("layer_norm_epsilon"', '0),\n        "layer_norm_eps": Field("layer_norm_epsilon"', "GPT-2 pads with 0, not with eos", f"{FOLDER}::test_config_fields_of_real_files"),
    ("support/hf_folder.py", "tensor = tensor.T  #", "tensor = tensor  #", "Conv1D not transposed", f"{FOLDER}::test_gpt2_layout_splits_c_attn_and_transposes"),
    ("support/hf_folder.py", "record.fused.index(place)]", "0]", "q, k and v are all q", f"{FOLDER}::test_gpt2_layout_splits_c_attn_and_transposes"),
    ("support/hf_folder.py", "len(found) < c.num_layers", "len(found) < 0", "layers that no tensor has", f"{READERS}::test_sizes_that_no_tensor_confirms"),
    ("support/hf_folder.py", "not tensor.isfinite().all()", "not stored.isfinite().all()", "overflow on the way to float32", f"{READERS}::test_tensors_that_are_no_plain_numbers"),
    ("support/hf_folder.py", "    except RecursionError as error:", "    except KeyError as error:", "brackets in brackets", f"{READERS}::test_brackets_in_brackets"),
    ("support/hf_folder.py", "if not isinstance(shard, str)]", "if shard is None]", "an index that names no files", f"{READERS}::test_index_of_shards"),
    ("support/hf_folder.py", 'r"GLOBAL ([\\w.]+)|(TorchScript)"', 'r"(nothing)|(at all)"', "a pickle with code is called damaged", f"{READERS}::test_pickles_with_code"),
    ("support/errors.py", '" ".join(said[: 20 * limit].split())', "said", "messages keep their line breaks, escaped", f"{READERS}::test_one_line_of_what_others_say"),
    ("support/download.py", "        huggingface_hub.get_cached_repo_tree(repo, **how)  #", "        #", "a part of a model taken for the whole", f"{FOLDER}::test_a_part_of_a_model_is_not_taken_for_the_whole"),
    ("support/download.py", "revision or REVISIONS.get(repo)", "revision", "the newest in place of the pinned", f"{FOLDER}::test_fetching_from_the_hub"),
    # ------------------------------------------------------------------- runs.py, distributed.py, state.py
    ('support/checkpoint.py', 'if hashlib.sha256(body).digest() != digest:', 'if False:', "damaged checkpoints are read", f"{FAULTS}::test_a_damaged_checkpoint_gives_way_to_the_one_before_it"),
    ('support/checkpoint.py', '        os.replace(path, folder / "checkpoint.previous.pt")\n', '        pass\n', "no checkpoint before the last", f"{FAULTS}::test_a_damaged_checkpoint_gives_way_to_the_one_before_it"),
    ('support/run_folder.py', 'fcntl.LOCK_EX | fcntl.LOCK_NB', 'fcntl.LOCK_SH | fcntl.LOCK_NB', "two runs share a folder", f"{FAULTS}::test_two_runs_in_one_folder"),
    ('support/run_folder.py', '"wb") as file:\n            file.write(content)', '"wb") as file:\n            os.replace(temporary, path)\n            file.write(content)', "renamed before it is written", f"{FAULTS}::test_a_killed_run_resumes_to_the_same_bits"),
    ("support/distributed.py", "return items[rank() :: world()]", "return items", "every process takes the whole batch", f"{DISTRIBUTED}::test_two_processes_equal_one"),
    ("support/distributed.py", "    exchange(dist.all_reduce, flat, group=group(flat.device.type))\n", "", "gradients are not summed", f"{DISTRIBUTED}::test_two_processes_equal_one"),
    ("support/distributed.py", "dtype=torch.float64) / world()  #", "dtype=torch.float64)  #", "scores are summed over processes", f"{DISTRIBUTED}::test_two_processes_equal_one"),
    ("support/distributed.py", "raise own or ValueError(", "if own:\n                raise own\n            print(", "a process goes on where another has failed", f"{DISTRIBUTED}::test_what_one_process_cannot_do_none_does"),
    ("support/distributed.py", "            torch.cuda.set_device(device)", "            pass", "all processes work on the first GPU", f"{DISTRIBUTED}::test_each_process_gets_its_gpu_before_anything_is_put_on_one"),
    ("support/distributed.py", 'if device_type == "cuda"', "if torch.cuda.is_available()", "the backend follows the machine", f"{DISTRIBUTED}::test_the_backend_follows_the_device"),
    ("support/checkpoint.py", "{state['position']['step']}/{rank}", "{state['position']['step']}", "processes that were not there share their dropout", f"{DISTRIBUTED}::test_a_process_that_was_not_there_draws_dropout_of_its_own"),
    ("train.py", "distributed.mean_scores(proxies.score(run.args.proxy, run.model, batches))", "proxies.score(run.args.proxy, run.model, batches)", "every process decides by its own scores", f"{DISTRIBUTED}::test_processes_that_would_disagree_agree"),
    ("train.py", "+ 1_000_003 * distributed.rank())", ")", "the same dropout masks in every process", f"{DISTRIBUTED}::test_each_process_draws_its_own_dropout"),
    ("train.py", "run.asked_to_stop or distributed.orphaned()", "run.asked_to_stop", "nobody stops when torchrun is gone", f"{DISTRIBUTED}::test_processes_without_torchrun_stop_together"),
    ("train.py", "distributed.sum_numbers([run.stop or run.asked_to_stop])[0] > 0", "run.stop or run.asked_to_stop", "a process stops at the end, and the others do not know", f"{DISTRIBUTED}::test_one_process_is_asked_to_stop_and_all_do"),
    ("proxies.py", "    return distributed.sum_tensors(sums)\n", "    return sums\n", "each process scores with the gradients of its share", f"{DISTRIBUTED}::test_every_proxy_scores_the_same_on_two_processes"),
    ("proxies.py", "        hg = distributed.sum_tensors(hg)\n", "", "grasp: H g of a share", f"{DISTRIBUTED}::test_every_proxy_scores_the_same_on_two_processes"),
    ("proxies.py", "        totals = distributed.sum_numbers(totals)\n", "", "fisher: the examples of a share", f"{DISTRIBUTED}::test_every_proxy_scores_the_same_on_two_processes"),
    ("proxies.py", "    [hits] = distributed.sum_numbers([hits])\n", "", "alpha: hits of a share over all examples", f"{DISTRIBUTED}::test_every_proxy_scores_the_same_on_two_processes"),
    ("proxies.py", "for batch in batches)\n    sums =", "for batch in distributed.share(batches))\n    sums =", "each share is a mean of its own", f"{DISTRIBUTED}::test_every_proxy_scores_the_same_on_two_processes"),
    ("proxies.py", "    for batch, once in distributed.shares(batches):\n        # L =", "    for batch, once in ((b, 1) for b in batches):\n        # L =", "every process scores all batches", f"{DISTRIBUTED}::test_each_batch_is_scored_by_one_process"),
    # -------------------------------------------------------------- off = frozen, single ranks that move
    ("lora.py", "            return A.detach(), B.detach()\n", "            return A, B\n", "what is frozen trains on", f"{WHEN_OFF}::test_forward_and_gradients_equal_dense_matrices"),
    ("lora.py", 'return self.enabled or self.when_off == "frozen"', "return self.enabled", "frozen is out", f"{WHEN_OFF}::test_out_leaves_and_frozen_stays"),
    ("model.py", "        if shortcut.in_forward:\n            x = x +", "        if shortcut.enabled:\n            x = x +", "a frozen shortcut is left out", f"{WHEN_OFF}::test_out_leaves_and_frozen_stays"),
    ("lora.py", "if a.in_forward and isinstance(a.base, nn.Linear)}", "if a.enabled and isinstance(a.base, nn.Linear)}", "frozen modules do not merge", f"{WHEN_OFF}::test_frozen_modules_merge_too"),
    ("lora.py", '"enabled": layer.in_forward}', '"enabled": layer.enabled}', "the file leaves out what is frozen", f"{WHEN_OFF}::test_a_saved_adapter_loads_to_equal_logits"),
    ('support/switches.py', 'on, "frozen" if frozen else "out"', 'on, layer.when_off', "a state_dict forgets what is frozen", f"{WHEN_OFF}::test_a_state_dict_carries_it"),
    ('lora.py', 'if layer.from_zero()[k].any()}', 'if True}', "stored: what never learned counts", f"{WHEN_OFF}::test_trainable_at_once_and_stored"),
    ("delta_lora.py", "            if layer.in_forward:\n", "            if layer.enabled:\n", "the export leaves out what is frozen", f"{WHEN_OFF}::test_delta_lora_through_several_reallocations"),
    ("delta_lora.py", "if not layer.enabled:\n                self.end", "if not layer.in_forward:\n                self.end", "a frozen module's stretch goes on", f"{WHEN_OFF}::test_delta_lora_through_several_reallocations"),
    ("support/switches.py", "        return A[on], B[:, on]  #", "        return A, B  #", "ranks that are off stay in", f"{RANKS}::test_forward_and_gradients_equal_dense_matrices"),
    ("support/switches.py", "A.detach()[ranks_off]", "A[ranks_off]", "frozen ranks get a gradient in A", f"{RANKS}::test_forward_and_gradients_equal_dense_matrices"),
    ("lora.py", "numel() for f in own) * len(ranks) // layer.r", "numel() for f in own)", "ranks that are off are counted", f"{RANKS}::test_counts_and_a_state_dict"),
    ("lora.py", '{"r": len(A), "scaling": scaling}', '{"scaling": scaling}', "the file names the rank of the whole factor", f"{RANKS}::test_the_exports_compute_what_was_measured"),
    ("proxies.py", "            layer.enabled, layer.ranks_off = True, []\n            for", "            layer.enabled = True\n            for", "ranks that are off are not scored", f"{RANKS}::test_scoring_takes_every_rank_and_leaves_them_off"),
    ("relatives/rank_budget.py", "            chosen.add(best)\n", "", "the one in every module is not kept", f"{RANKS}::test_the_best_parts_with_one_in_every_module"),
    ("relatives/rank_budget.py", "            budget -= rank_costs[name]\n", "", "the one in every module is not paid for", f"{RANKS}::test_the_best_parts_with_one_in_every_module"),
    ("relatives/rank_steps.py", "            if k not in layer.ranks_off\n", "", "ranks that are off are stepped", f"{RANKS}::test_steps_equal_adamw_by_hand_on_the_sliced_parameters"),
    ("relatives/rank_steps.py", "            layer.lora_B[:, k] = column\n", "", "B does not get its step", f"{RANKS}::test_steps_equal_adamw_by_hand_on_the_sliced_parameters"),
    ("relatives/rank_steps.py", "            layer.lora_A.grad = layer.lora_B.grad = None\n", "            pass\n", "gradients of factors add up over steps", f"{RANKS}::test_steps_equal_adamw_by_hand_on_the_sliced_parameters"),
    ("train.py", "for rule in reversed(run.around):", "for rule in run.around:", "W moves before A and B have", f"{RANKS}::test_the_exports_compute_what_was_measured"),
    ("support/checkpoint.py", 'layer.ranks_off = state["ranks_off"][name]', "layer.ranks_off = []", "resumption switches every rank on", f"{RANKS}::test_resuming_gives_the_same_bits"),
    # ----------------------------------------------------------------------- tools: PEFT, the oracle
    ('tools/peft/writing.py', 'return Pair(self.lora_A, self.scaling * self.lora_B, 1.0, self.magnitude)', 'return Pair(self.lora_A, self.lora_B, 1.0, self.magnitude)', "the scale is lost in folding", f"{PEFT}::test_padding_keeps_the_product"),
    ("tools/peft/writing.py", "column += part.r", "column += 0", "q and v of GPT-2 share columns", f"{PEFT}::test_gpt2_is_fused_exactly"),
    ("tools/peft/writing.py", "p.scaling * p.r for n, p in paths.items() if", "p.scaling * r for n, p in paths.items() if", "alpha of another rank's scale", f"{PEFT}::test_a_good_folder_comes_back_as_it_went"),
    ("support/families.py", '"fc1": "mlp.up_proj",', '"fc1": "mlp.gate_proj",', "up_proj under the gate's name", f"{PEFT}::test_names_and_task_of_a_causal_family"),
    ("tools/peft/writing.py", '"SEQ_CLS" if head else "CAUSAL_LM"', '"SEQ_CLS"', "a language model goes out as a classifier", f"{PEFT}::test_names_and_task_of_a_causal_family"),
    ("tools/peft/writing.py", '"smollm2-q4": None', '"smollm2-q4": download.SMOLLM2_REPO', "quantised weights under the name of the others", f"{PEFT}::test_the_base_of_an_export_is_named_as_what_it_is"),
    ("tools/peft/commands.py", "    if task and not head:", "    if False:", "a head that was never trained is evaluated", f"{PEFT}::test_a_language_models_adapter_comes_back_through_the_command"),
    ("tools/peft/reading.py", "alpha / math.sqrt(r) if", "alpha / r if", "rsLoRA read as LoRA", f"{PEFT}::test_rslora_is_only_a_scale"),
    ("tools/peft/config.py", 'rf"(.*\\.)?({key})$"', 'rf"(.*)?({key})$"', "patterns match inside a name", f"{PEFT}::test_pattern_keys_match_as_pefts_do"),
    ("tools/peft/config.py", "0 < value <= sys.float_info.max", "0 < value", "an infinite alpha is read", f"{PEFT}::test_a_field_of_the_config_is_checked_before_anything_is_built"),
    ("tools/peft/config.py", "    number = isinstance(value, int | float) and not isinstance(value, bool)", "    number = isinstance(value, int | float)", "true is an alpha", f"{PEFT}::test_a_field_of_the_config_is_checked_before_anything_is_built"),
    ("tools/peft/config.py", "field not in fields and field not in ignored and value", "field.startswith('use_') and value and field not in fields", "unknown fields pass", f"{PEFT}::test_fields_that_may_change_the_function_are_refused_unless_empty"),
    ("support/flags.py", "if len(set(given)) > 1 and", "if len(given) > 2 and", "of two allocators the last one wins", "test_relatives_bad_input.py::test_bad_input_is_one_line"),
    ("tools/peft/reading.py", 'config["lora_alpha"] / (start + 1e-5)', 'config["lora_alpha"] / (r + 1e-5)', "AdaLoRA's scale follows the ranks that are left", f"{PEFT}::test_adalora_comes_in_as_ordinary_pairs_of_what_it_kept"),
    ("tools/peft/reading.py", "Pair(e * a, b,", "Pair(a, b,", "AdaLoRA comes in without E", f"{PEFT}::test_adalora_comes_in_as_ordinary_pairs_of_what_it_kept"),
    ("tools/compare.py", "        if not study.widen:\n            return [], best\n", "", "a grid widens though the study says no", f"{COMPARE}::test_without_widening_the_rates_that_are_listed_are_all_there_are"),
    ("tools/compare.py", "task.test: task.dev}", "task.test: \"train.tsv\"}", "training pairs are reported in place of dev", f"{COMPARE}::test_dev_stands_for_the_test_set_where_the_study_says_so"),
    ("tools/bench/relatives.py", "timing.ratio(seconds[name], seconds[first])", "timing.ratio(seconds[first], seconds[name])", "the time of LoRA beside a method", f"{BENCH}::test_a_relative_beside_plain_lora"),
    ("tools/peft/reading.py", "        if shape != wanted:", "        if shape[0] != wanted[0]:", "a wrong input width passes", f"{PEFT}::test_only_the_input_width_is_wrong"),
    ("tools/peft/commands.py", "problems += reading.fit(config, pairs, head, model)[2]", "reading.fit(config, pairs, head, model)", "inspect looks away from the model", f"{PEFT}::test_a_folder_for_another_model"),
    ("tools/plot.py", "-flags[\"lora_alpha\"] / flags[\"r\"] * now_B", "-now_B", "the change of W with B A of scale 1 taken off", "test_plot.py::test_what_delta_lora_did_to_the_weights"),
    ("tools/plot.py", 'if state["on"][name] or frozen:', "if True:", "the pair of a module that is off taken off W", "test_plot.py::test_what_delta_lora_did_to_the_weights"),
    ("tools/bench/timing.py", "for name in arms if i else ():", "for name in arms:", "the round that warms up is counted", "test_bench.py::test_arms_take_turns_and_the_first_round_is_not_counted"),
    ("tools/words_alone.py", "(word not in a & b)", "(word in a & b)", "shared words and others exchanged", "test_words_alone.py::test_features_by_hand"),
    ('tools/oracle/check.py', 'largest = expected.abs().max().item() or 1.0', 'largest = 1e6', "errors look small", f"{ORACLE}::test_errors_between_results"),
    ("tools/oracle/check.py", "for module in (ours, ours_adapters, ours_rules):", "for module in (ours,):", "the interface without the relatives", f"{ORACLE}::test_the_interface_names_every_function_and_shortcut"),
    ("tools/oracle/golden.py", 'case.function in ("keep_top", "adalora_keep")', 'case.function == "keep_top"', "of tied triplets one choice alone is right", f"{ORACLE}::test_the_same_export_gives_the_same_bytes"),
    ("tools/oracle/causes_adapters.py", "NOT_DETACHED: call(over, rows(v)),", "NOT_DETACHED: call(over, rows(v).detach()),", "oracle: a mistake that is none", f"{ORACLE}::test_each_mistake_alone_is_noticed_and_named"),
    ("tools/oracle/causes_rules.py", 'if mistake == CLIPPED_FIRST:', 'if mistake:', "oracle: every mistake of RITE clips first", f"{ORACLE}::test_each_mistake_alone_is_noticed_and_named"),
    ("tools/oracle/ours_rules.py", "U @ M.T if name == \"lora_A\" else M @ U.T", "U @ M.T if name == \"lora_A\" else -M @ U.T", "oracle: a moment of RITE with the other sign", f"{ORACLE}::test_our_own_passes_everything"),
    ("relatives/prolora.py", "shift = max(1, len(chunk) // x)", "shift = len(chunk) // x", "no rotation where the copies outnumber the ranks", f"{ORACLE}::test_our_own_passes_everything"),
    ("relatives/riemannian.py", "B.T @ B + delta * eye, grad_A", "B.T @ B + delta**2 * eye, grad_A", "delta squared for A", f"{ORACLE}::test_our_own_passes_everything"),
    # ------------------------------------------------- relatives: tied, condlora, cora, reslora
    ("support/doors.py", "        if layer.unmergeable:\n", "        if False:\n", "a branch that is no matrix is half merged", f"{ADAPTERS2}::test_what_is_no_matrix_is_not_merged"),
    ("lora.py", "            about[name][\"kind\"] = layer.kind\n", "            pass\n", "reslora is stored as if it were LoRA", f"{ADAPTERS2}::test_the_adapter_file_loads_with_equal_logits"),
    ("relatives/reslora.py", "    pre = 1\n", "    pre = 2\n", "reslora_input adds two inputs", f"{ADAPTERS2}::test_logits_equal_the_definition"),
    ("relatives/tied.py", "self.lora_v[:, None] * self.lora_B\n", "self.lora_B\n", "tied without v", f"{ADAPTERS2}::test_logits_equal_the_definition"),
    ("relatives/tied.py", "for first, *others in by_place(layers):", "for first, *others in [list(layers.values())]:", "tied: one pair for q, k and v", f"{ADAPTERS2}::test_tied_and_condlora_share_over_blocks_and_not_over_places"),
    ("relatives/tied.py", "layer.lora_A, layer.lora_B = first.lora_A, first.lora_B", "layer.lora_A.data, layer.lora_B.data = first.lora_A.data, first.lora_B.data", "tied: equal at the start, and not one parameter", f"{ADAPTERS2}::test_counts_are_exact"),
    ("relatives/condlora.py", "F.linear(self.lora_A, W)", "self.lora_A @ W", "condlora: A from the columns of W", f"{ADAPTERS2}::test_logits_equal_the_definition"),
    ("relatives/condlora.py", "self.base.weight.detach()", "self.base.weight", "condlora: a gradient through W in A and B", f"{ADAPTERS2}::test_condlora_gradients_are_sums_and_pass_w_by"),
    ("relatives/condlora.py", "self.weight_before_merge if self.merged else", "", "condlora: A and B from the merged weight", f"{ADAPTERS2}::test_merge_is_exact_and_unmerge_gives_the_bits"),
    ("relatives/cora.py", "full_matrices=False)[0]", "full_matrices=False)[2].T[: len(weights[0])]", "cora: right singular vectors", f"{ADAPTERS2}::test_cora_takes_b_from_the_common_subspace"),
    ("relatives/cora.py", "[w.double() for w in weights]", "[w.double() for w in weights[:1]]", "cora: the subspace of W_q alone", f"{ADAPTERS2}::test_cora_takes_b_from_the_common_subspace"),
    ("relatives/cora.py", "self.lora_A.zero_()", "pass", "cora: A drawn, so that it starts elsewhere", f"{ADAPTERS2}::test_starts_as_the_pretrained_model"),
    ("relatives/cora.py", "        return self.lora_A  # (r, in)", "        return self.lora_B.T", "cora: B != 0 is taken for what was learned", f"{ADAPTERS2}::test_counts_are_exact"),
    ("relatives/reslora.py", "self.before if a.in_forward)]", "self.before)]", "reslora: what is off stays with its neighbours", f"{ADAPTERS2}::test_off_means_off"),
    ("relatives/reslora.py", "chain[max(0, n - layer.pre) : n][::-1]", "chain[:n][::-1]", "reslora: all blocks before, not pre of them", f"{ADAPTERS2}::test_predecessors_beyond_the_fourth_are_left_out"),
    ("relatives/reslora.py", "        return x  # (b, t, in)", "        return x.detach()", "reslora_input: no gradient to the earlier input", f"{ADAPTERS2}::test_gradients_by_finite_differences"),
    ("relatives/reslora.py", "        if not self.in_forward:\n            return None\n", "", "reslora_middle: what is off goes on to its neighbours", f"{ADAPTERS2}::test_off_means_off"),
    ("relatives/reslora.py", "        if self.last:\n            self.passed.clear()", "        if False:\n            self.passed.clear()", "reslora: the graph outlives the pass", f"{ADAPTERS2}::test_a_deep_copy_shares_within_itself_alone"),
    ("relatives/reslora.py", "    every_token = True\n", "", "reslora: the last block at one position", f"{ADAPTERS2}::test_logits_equal_the_definition"),
    ("proxies.py", "each = {id(p): (a", "each = {object(): (a", "grasp: what is shared counts for each module", f"{ADAPTERS2}::test_grasp_takes_what_is_shared_once"),
    ("lora.py", "            if id(factor) not in seen:\n", "            if True:\n", "what is shared trains once for each module", f"{ADAPTERS2}::test_counts_are_exact"),
    ("support/run.py", "run.plan.costs, budget, spent)", "run.plan.costs, budget)", "the table adds up prices of what is shared", f"{ADAPTERS2}::test_the_run_says_what_is_spent_with_what_is_shared_once"),
    # --------------------------------------------------- settings.py, form.py, checkpoint.py: what is refused
    ("support/settings.py", "if args.delta_ratio and args.delta_start + 2 > steps:", "if args.delta_ratio and args.delta_start + 1 > steps:", "Delta-LoRA that never moves W is let in", f"{SETTINGS}::test_delta_lora_that_never_moves_a_weight_is_refused"),
    ("support/settings.py", "if useless and not has:", "if useless and has:", "what has an effect is refused", f"{SETTINGS}::test_what_would_do_nothing_is_refused"),
    ('support/settings.py', '("every", a.allocate not in ("none", "static"),', '("every", True,', "an interval beside a static choice", f"{SETTINGS}::test_what_would_do_nothing_is_refused"),
    ("support/settings.py", "a.lr * a.weight_decay >= 1,", "a.lr * a.weight_decay > 10,", "a decay that erases is let in", f"{SETTINGS}::test_what_would_do_nothing_is_refused"),
    ("support/settings.py", "a.delta_ratio == -1,", "False,", "a lambda that undoes LoRA is let in", f"{SETTINGS}::test_what_would_do_nothing_is_refused"),
    ("support/settings.py", "math.ceil(batches / args.accumulate)", "math.ceil(batches // args.accumulate)", "steps of an epoch rounded down", f"{SETTINGS}::test_what_the_sizes_cut_short_is_said"),
    ("support/settings.py", "a.warmup >= steps,", "a.warmup > steps,", "a warm-up as long as the run is not said", f"{SETTINGS}::test_what_the_sizes_cut_short_is_said"),
    ("support/settings.py", "reads_data and asked > examples,", "reads_data and asked >= examples,", "said although all is scored as asked", f"{SETTINGS}::test_what_the_sizes_cut_short_is_said"),
    ("proxies.py", 'WITHOUT_DATA = ("constant", "synflow")', 'WITHOUT_DATA = ("constant",)', "synflow is said to read batches", f"{SETTINGS}::test_proxies_without_data"),
    ('support/doors.py', 'if low < 0 or high >= limit:', 'if low < 0 or high > limit:', "an id one beyond the table is let in", f"{DOORS}::test_batches_without_a_score"),
    ('support/doors.py', '    if not isinstance(batches, list | tuple):', '    if False:', "a generator of batches is let in", f"{DOORS}::test_batches_without_a_score"),
    ("support/form.py", "fits = type(value) is form if", "fits = isinstance(value, form) if", "true is an int", f"{DOORS}::test_forms"),
    ("support/form.py", "if value.keys() != form.keys():", "if not form.keys() <= value.keys():", "keys that nobody knows are let in", f"{DOORS}::test_forms"),
    ("support/checkpoint.py", "            and bool(value.isfinite().all())\n", "", "NaN is put back", f"{DOORS}::test_wrong_content_gives_way_to_the_checkpoint_before"),
    ("support/checkpoint.py", "(*value.shape,) == (*shape,) and value.dtype == dtype", "value.dtype == dtype", "other shapes are put back", f"{DOORS}::test_wrong_content_gives_way_to_the_checkpoint_before"),
    ("support/checkpoint.py", "misfit(state, form_of(state, like)) if like", "misfit(state, FORM) if like", "a checkpoint of another run is put back", f"{DOORS}::test_wrong_content_gives_way_to_the_checkpoint_before"),
    ("support/checkpoint.py", "return len(value) == len(groups) and all(", "return all(", "an optimizer without its group", f"{DOORS}::test_wrong_content_gives_way_to_the_checkpoint_before"),
    ("support/hf_folder.py", 'found = re.search(r"GLOBAL', 'found = re.search(r"GLUBAL', "code is called damage", f"{DOORS}::test_a_pickle_with_code_is_called_that"),
    ("support/run_folder.py", "if before == now:", "if True:", "a run goes on with other data", f"{DOORS}::test_a_run_keeps_its_data"),
    ("support/glue.py", 'e.get("token_type_ids"), e["label"])', 'e.get("token_type_ids"))', "labels are not in the fingerprint", f"{DOORS}::test_a_run_keeps_its_data"),
    ("support/glue.py", "        if len(row) != width:", "        if len(row) < width:", "a tab in a text shifts the columns", f"{GLUE}::test_broken_files_are_refused_with_file_and_line"),
    ("train.py", "    if model.fresh and not args.resume:", "    if model.fresh:", "a loaded head is called fresh", f"{DOORS}::test_eval_only_says_what_it_evaluates"),
    ('support/switches.py', 'if found["lora_switches"][1] or layer.locked:', 'if bool(found["lora_switches"][1]) != layer.locked:', "a merged weight under another's memory", f"{DOORS}::test_two_merged_models_do_not_exchange_state_dicts"),
    ('support/switches.py', 'layer.enabled, layer.when_off = on,', '_, layer.when_off = on,', "a state_dict forgets what is on", f"{DOORS}::test_a_state_dict_loads_to_the_same_logits"),
    ("lora.py", "        layer.locked = bool(chosen)\n", "        layer.locked = layer.merged\n", "what was off can be switched while merged", f"{DOORS}::test_no_module_of_a_merged_model_is_switched"),
    # ------------------------------------------------------- dora, asymmetry, lora_xs, sbora, prolora
    ("relatives/dora.py", "norm = v.norm(dim=1)", "norm = v.new_ones(len(B))", "DoRA does not divide by the norm", f"{RELATIVES1}::test_logits_gradients_and_scores_equal_the_dense_definition"),
    ("relatives/dora.py", "        with torch.no_grad(), torch.autocast", "        with torch.enable_grad(), torch.autocast", "DoRA's norm gets a gradient", f"{RELATIVES1}::test_logits_gradients_and_scores_equal_the_dense_definition"),
    ("relatives/dora.py", "            v = self.weight() + self.scaling * (B @ A)  # (out, in)\n", "            v = self.weight()\n", "the norm is of W alone", f"{RELATIVES1}::test_logits_gradients_and_scores_equal_the_dense_definition"),
    ("relatives/dora.py", "(*large.wide(base.weight)).norm(dim=1)", "(*large.wide(base.weight)).square().sum(1)", "the magnitude starts at the norm squared", f"{RELATIVES1}::test_at_the_start_the_model_is_the_pretrained_one"),
    ("relatives/dora.py", "wx = h if self.base.bias is None else h - self.base.bias", "wx = h", "the bias is scaled as well", f"{RELATIVES1}::test_logits_gradients_and_scores_equal_the_dense_definition"),
    ("relatives/dora.py", "wx = F.linear(x, self.base.weight)  # (b, t, out)", "wx = h - self.base.bias", "the base term without dropout", f"{RELATIVES1}::test_dropout_is_on_all_that_is_added"),
    ("relatives/dora.py", "return self.weight_before_merge if self.merged else self.base.weight", "return self.base.weight", "delta_w of the merged weight", f"{RELATIVES1}::test_merged_it_computes_the_same_and_comes_back_bit_for_bit"),
    ("relatives/asymmetry.py", "A = q.T.contiguous().to(self.lora_A)", "A = self.lora_A.detach()", "A as LoRA draws it", f"{RELATIVES1}::test_asymmetry_is_a_linear_model_in_b"),
    ("relatives/asymmetry.py", 'return {"lora_B": self.lora_B}', 'return {"lora_A": self.lora_A, "lora_B": self.lora_B}', "A trains too", f"{RELATIVES1}::test_parameters_are_counted_exactly"),
    ("relatives/lora_xs.py", "S[:r, None] * Vh[:r]", "Vh[:r]", "A without the singular values", f"{RELATIVES1}::test_logits_gradients_and_scores_equal_the_dense_definition"),
    ("relatives/lora_xs.py", "return (U * sign).to(device, dtype), (A * sign.T).to(device, dtype)", "return U.to(device, dtype), A.to(device, dtype)", "the signs of the SVD as they come", f"{RELATIVES1}::test_lora_xs_is_the_best_approximation_at_r_identity"),
    ("relatives/lora_xs.py", "self.lora_B @ R  #", "self.lora_B @ R.T  #", "R transposed", f"{RELATIVES1}::test_logits_gradients_and_scores_equal_the_dense_definition"),
    ("relatives/lora_xs.py", "DEVIATION = 1e-5", "DEVIATION = 1e-5**0.5", "1e-5 taken for a variance", f"{RELATIVES1}::test_lora_xs_start_has_the_deviation_of_the_paper"),
    ("relatives/sbora.py", "torch.randperm(n, generator=generator)[:r]", "torch.randint(n, (r,), generator=generator)", "indices that repeat", f"{RELATIVES1}::test_sbora_gather_equals_the_product_with_the_identity"),
    ("relatives/sbora.py", "F.linear(h[..., self.lora_index], self.scaling * B)", "F.linear(h[..., : self.r], self.scaling * B)", "the first r inputs", f"{RELATIVES1}::test_logits_gradients_and_scores_equal_the_dense_definition"),
    ("relatives/sbora.py", "index_add(-1, self.lora_index,", "index_copy(-1, self.lora_index,", "the outputs S replaced, not added to", f"{RELATIVES1}::test_logits_gradients_and_scores_equal_the_dense_definition"),
    ("relatives/sbora.py", "F.linear(h, self.scaling * A))", "F.linear(h, A))", "FB without the scale", f"{RELATIVES1}::test_logits_gradients_and_scores_equal_the_dense_definition"),
    ("relatives/prolora.py", "chunk.roll(-j * shift, 0)", "chunk.roll(-j * shift, 1)", "rolled along the features", f"{RELATIVES1}::test_logits_gradients_and_scores_equal_the_dense_definition"),
    ("relatives/prolora.py", "chunk.roll(-j * shift, 0)", "chunk.roll(j * shift, 0)", "rolled the other way", f"{RELATIVES1}::test_logits_gradients_and_scores_equal_the_dense_definition"),
    ("relatives/prolora.py", "shift = max(1, len(chunk) // x)", "shift = 0", "no rotation", f"{RELATIVES1}::test_prolora_blocks_depend_on_the_rotation_alone"),
    ("relatives/prolora.py", "self.lora_A_shared = nn.Parameter(A[:shared, : n_in // x_A].clone())", "self.lora_A_shared = nn.Parameter(A[:shared, : n_in // x_A].clone() * x_A**0.5)", "drawn by the chunk's fan-in", f"{RELATIVES1}::test_prolora_bound_is_rectified_and_its_plain_cases_are_lora"),
    ("lora.py", '            about[name]["kind"] = layer.kind\n', "            pass\n", "the file does not say that it is DoRA", f"{RELATIVES1}::test_an_adapter_file_loads_as_plain_lora_where_that_is_equal"),
    # ------------------------------------------------ LLaMA and its relatives, GGUF files, generation
    ("model.py", "[first * cos - second * sin, second * cos + first * sin]", "[first * cos + second * sin, second * cos - first * sin]", "q and k turned the other way", f"{CAUSAL}::test_angles_add_up"),
    ("model.py", "first, second = x.chunk(2, dim=-1)\n    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)", "first, second = x[..., ::2], x[..., 1::2]\n    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)", "interleaved instead of half-split", f"{CAUSAL}::test_logits_equal_the_dense_derivation"),
    ("model.py", "frequencies = (1 - s) * frequencies / factor + s * frequencies", "frequencies = frequencies / factor", "all frequencies scaled alike", f"{CAUSAL}::test_logits_equal_the_dense_derivation"),
    ("model.py", "q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal, enable_gqa=grouped", "q, k.repeat(1, q.shape[1] // k.shape[1], 1, 1), v.repeat(1, q.shape[1] // v.shape[1], 1, 1), attn_mask=mask, dropout_p=p, is_causal=causal", "keys tiled a b a b", f"{CAUSAL}::test_logits_equal_the_dense_derivation"),
    ("model.py", "act(self.gate_proj(x)) * h", "self.gate_proj(x) * act(h)", "the activation on the wrong factor", f"{CAUSAL}::test_logits_equal_the_dense_derivation"),
    ("model.py", "rotate(self.k_norm(self.split_heads(self.k_proj(x))), turns[1])", "self.k_norm(rotate(self.split_heads(self.k_proj(x)), turns[1]))", "k normalised after it is turned", f"{CAUSAL}::test_logits_equal_the_dense_derivation"),
    ("model.py", "turns = [pick(part.expand(len(read), -1, -1), read) for part in turned], turned", "turns = [part[:, :1] for part in turned], turned", "the query that is read stays at position 0", f"{CAUSAL}::test_last_layer_at_one_position_equals_all_positions"),
    ("model.py", "wide = torch.promote_types(x.dtype, torch.float32)", "wide = x.dtype", "angles in bfloat16", f"{CAUSAL}::test_angles_in_bfloat16_are_those_of_float32"),
    ("model.py", "read is None and (cache is None or cache.k is None)", "read is None", "a new token sees the first key alone", f"{GENERATION}::test_cached_equals_uncached"),
    ("proxies.py", "return int((labels[:, 1:] != -100).sum()) if", "return labels[:, 1:].numel() if", "a prompt's tokens count as predicted", f"{LANGUAGE}::test_scores_of_first_order_from_the_gradient_of_the_place"),
    ("proxies.py", "block.q_proj(queries.detach())", "block.q_proj(queries)", "SYNFLOW flows down through q and k too", f"{PROXIES}::test_synflow_is_twice_what_the_flow_loses_without_the_pair"),
    ("proxies.py", "weight_one(block.gate_proj(x.detach()))", "weight_one(block.gate_proj(x))", "SYNFLOW flows down through the gate too", f"{PROXIES}::test_synflow_is_twice_what_the_flow_loses_without_the_pair"),
    ("proxies.py", "(part / part.detach().amax().clamp(min=1) for part in (q, k))", "(part for part in (q, k))", "SYNFLOW's q . k leaves the range", f"{PROXIES}::test_synflow_of_a_deep_net_stays_in_range"),
    ("proxies.py", "        block.feed_forward = types.MethodType(linear_feed_forward, block)\n", "", "SYNFLOW with the activation", f"{PROXIES}::test_synflow_is_twice_what_the_flow_loses_without_the_pair"),
    ("proxies.py", "k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))", "k, v = (part.repeat(1, q.shape[1] // k.shape[1], 1, 1) for part in (k, v))", "SYNFLOW reads the heads of keys as a b a b", f"{LANGUAGE}::test_synflow_written_out"),
    ("support/hf_folder.py", "tensor = tensor + FAMILIES[family].gain_offset", "pass", "Gemma's gains without 1", f"{CAUSAL}::test_a_folder_gives_the_model_that_was_written"),
    ("support/generation.py", "positions = cache.lengths[:, None]  # (b, 1)", "positions = torch.full_like(cache.lengths, cache.mask.shape[1])[:, None]", "short rows go on at the longest one's position", f"{GENERATION}::test_cached_equals_uncached"),
    ("support/generation.py", "ordered.where(before < top_p, 0.0)", "ordered.where(before + ordered < top_p, 0.0)", "the nucleus stops one token early", f"{GENERATION}::test_the_nucleus"),
    ("support/generation.py", "tokens = tokens.where(~ended, model.config.pad_token_id)", "pass", "a text goes on after its end", f"{GENERATION}::test_a_text_ends_at_its_end"),
    ("support/generation.py", "candidates = [\n                (total[i, j].item() / length**length_penalty,", "candidates = [\n                (total[i, j].item() * length**length_penalty,", "the length penalty upside down", f"{GENERATION}::test_beams_equal_a_search_by_hand"),
    ("support/generation.py", "        cache.reorder((beam + n * torch.arange(b, device=device)[:, None]).flatten())\n", "", "beams go on with another's cache", f"{GENERATION}::test_beams_equal_a_search_by_hand"),
    ("support/gguf_file.py", "return pairs.transpose(1, 2).reshape(tensor.shape)", "return pairs.reshape(tensor.shape)", "rows of q and k left interleaved", f"{GGUF}::test_a_file_gives_the_model_that_was_written"),
    ("support/gguf_file.py", "tensor = tensor - 1", "pass", "1 added twice to Gemma's gains", f"{GGUF}::test_a_file_gives_the_model_that_was_written"),
    ("support/gguf_file.py", "merges += [(-score, pair)", "merges += [(score, pair)", "merges of the lowest score first", f"{GGUF}::test_sentence_piece_merges_by_score"),
    ("lora.py", 'places = places - {"gate_proj"}', 'pass', "a gate where there is none", f"{CAUSAL}::test_gate_proj_is_a_place_where_there_is_a_gate"),
    # ----------------------------------------------- relatives: optimizer rules, allocators, theorem
    ("relatives/plain.py", "A.grad.copy_(new_A)", "A.grad = new_A.T.contiguous().T", "gradients in another layout than A", f"{RULES}::test_adamw_takes_the_gradients_that_the_rule_makes"),
    ("relatives/plain.py", "            if A.grad is not None:\n", "            if True:\n                A.grad, B.grad = (0 * p if p.grad is None else p.grad for p in (A, B))\n", "a module that is off is stepped", f"{RULES}::test_off_means_off_and_the_rest_is_adamw"),
    ("support/run.py", "    if not run.finished:\n", "    if True:\n", "a finished run loses its test result", f"{TRAIN}::test_a_finished_run_keeps_the_test_that_one_resume_asked_for"),
    ("relatives/lora_plus.py", '(fast if ".lora_B" in name', '(fast if ".lora_A" in name', "LoRA+ with A and B swapped", f"{RULES}::test_loraplus_moves_b_16_times_as_far_and_decays_it_so"),
    ("relatives/lora_plus.py", ', "lr_ratio": ratio}', "}", "the loop forgets LoRA+'s ratio", f"{RULES}::test_the_loop_keeps_the_ratio"),
    ("relatives/riemannian.py", "B.T @ B + delta * eye, grad_A", "A @ A.T + delta * eye, grad_A", "A's gradient through its own metric", f"{RULES}::test_riemannian_to_first_order_is_two_projections"),
    ("relatives/riemannian.py", "A @ A.T + delta * eye, grad_B", "A @ A.T, grad_B", "no delta for B", f"{RULES}::test_riemannian_solves_its_two_systems"),
    ("relatives/lora_pro.py", "    new_B = new_B - B @ (of_B[2] @ (B.T @ new_B))  # (out, r)\n", "", "LoRA-Pro counts P_B G P_A twice", f"{RULES}::test_lora_pro_is_the_least_squares_solution"),
    ("relatives/lora_pro.py", "X = sylvester(of_B, of_A, -new_A @ A.T)", "X = sylvester(of_B, of_A, new_A @ A.T)", "X with the other sign", f"{RULES}::test_lora_pro_changes_the_gradients_least"),
    ("relatives/lora_pro.py", "(new_B - B @ X).to(dtype)", "(new_B + B @ X).to(dtype)", "X does not cancel in E", f"{RULES}::test_lora_pro_is_the_least_squares_solution"),
    ("relatives/lora_pro.py", "new_A = of_B[2] @ gA / s**2", "new_A = of_B[2] @ gA / s", "LoRA-Pro with s in place of s^2", f"{RULES}::test_lora_pro_is_the_least_squares_solution"),
    ("relatives/lora_rite.py", "values.clamp(min=0).sqrt()", "values.sqrt()", "fewer tokens than r: the root of a rounding error", f"{RULES}::test_rite_with_fewer_tokens_than_r"),
    ("relatives/lora_rite.py", "    return torch.where(g.square().mean().sqrt() > 1, 0.0, g), U, inverse", "    return g, U, inverse", "RITE clips before it sets to zero, not after", f"{RULES}::test_rite_by_hand_in_the_space_of_the_other_factor"),
    ("relatives/lora_rite.py", "(values.clamp(min=0).sqrt() + EPS)", "(values.clamp(min=0) + EPS).sqrt()", "eps under RITE's root", f"{RULES}::test_rite_by_hand_in_the_space_of_the_other_factor"),
    ("relatives/lora_rite.py", "b1 * state[\"exp_avg\"] @ turn.T", "b1 * state[\"exp_avg\"]", "RITE's first moment does not turn", f"{RULES}::test_which_steps_do_not_see_the_basis"),
    ("relatives/lora_rite.py", '(state["exp_avg"] @ inverse.T +', '(state["exp_avg"] @ inverse +', "RITE's step by R^-1", f"{RULES}::test_rite_by_hand_in_the_space_of_the_other_factor"),
    ("relatives/adalora.py", "** 3)", "** 2)", "a square schedule", f"{ALLOCATORS}::test_the_schedule_by_hand"),
    ("relatives/adalora.py", "self.sensitivity[name] * self.uncertainty[name]", "self.sensitivity[name]", "AdaLoRA without the uncertainty", f"{ALLOCATORS}::test_scores_and_masks_by_brute_force"),
    ("relatives/adalora.py", 's[f"{n}.lora_B"].mean(0)', 's[f"{n}.lora_B"].sum(0)', "B's entries are summed", f"{ALLOCATORS}::test_scores_and_masks_by_brute_force"),
    ("relatives/adalora.py", "            layer.lora_E *= self.mask[name]\n", "            layer.lora_A *= self.mask[name]\n", "the mask is on A", f"{ALLOCATORS}::test_scores_and_masks_by_brute_force"),
    ("relatives/triplets.py", "slope = 2 * off @ rows / off.norm().clamp(min=1e-12)", "slope = 4 * off @ rows", "the penalty's norm squared", f"{ALLOCATORS}::test_the_penalty_by_finite_differences"),
    ("relatives/exchange.py", "found[name, k] = -whole + without - alone", "found[name, k] = without - whole", "importance without the rank alone", f"{ALLOCATORS}::test_importance_by_deleting_ranks"),
    ("relatives/alora.py", "if due and self.t <= self.last:", "if due:", "a last round, after which nothing trains", f"{ALLOCATORS}::test_when_a_round_is"),
    ("relatives/lora_plus.py", '(fast if ".lora_B" in name', '(fast if name.endswith(".lora_B")', "PRoLoRA's B is slow", f"{RULES}::test_every_adapter_goes_with_a_rule_or_is_refused_by_name"),
    ("relatives/condlora.py", "        W = W.to(self.lora_A.dtype)  # of a base in bfloat16\n", "", "CondLoRA on bfloat16 cannot be written", f"{LARGE}::test_relatives_on_a_base_in_bf16"),
    ("relatives/alora.py", "                layer.lora_B[:, k] = 0\n", "", "a new rank begins with the old B", f"{ALLOCATORS}::test_a_round_keeps_the_budget_and_the_outputs_of_what_grows"),
    ("relatives/alora.py", "            self.layers[name].lora_B[:, k] = 0  # gone, not kept for later\n", "", "what is pruned is kept and counted", f"{ALLOCATORS}::test_a_round_keeps_the_budget_and_the_outputs_of_what_grows"),
    ("relatives/exchange.py", "key=means.get, reverse=True", "key=means.get", "ranks go to the least important", f"{ALLOCATORS}::test_one_each_in_the_order_of_mean_importance"),
    ("relatives/exchange.py", "return worst[: len(worst) - left], grown", "return worst, grown", "more is pruned than grows", f"{ALLOCATORS}::test_who_loses_and_who_gains"),
    ("relatives/alora.py", "alpha = lora_alpha * places / r", "alpha = lora_alpha", "the scale of 2 r places", f"{ALLOCATORS}::test_places_that_are_closed_compute_nothing"),
    # ----------------------------------------------------- what readers could change without a test
    ("tools/compare.py", 'folders = {"tune": (work / "tune").resolve(), "final": source.resolve()}', 'folders = {"tune": source.resolve(), "final": source.resolve()}', "rates are chosen on the reported pairs", f"{COMPARE}::test_a_study_makes_each_run_once_and_an_interrupted_one_goes_on"),
    ("tools/compare.py", '["--lr", f"{run.lr:g}", "--seed", str(run.seed), "--out", str(folder)]', '["--out", str(folder)]', "all rates and seeds are the same run", f"{COMPARE}::test_a_study_makes_each_run_once_and_an_interrupted_one_goes_on"),
    ("tools/compare.py", "round(means[lr], 9)", "means[lr]", "of equal rates rounding chooses", f"{COMPARE}::test_equal_learning_rates_give_the_smaller_and_seeds_count_alike"),
    ("tools/compare.py", 'if line["dev"] else 0.0', 'if line["dev"] else 1.0', "the rate that diverges wins", f"{COMPARE}::test_a_rate_whose_loss_is_not_a_number_is_the_worst"),
    ("tools/compare.py", 'line["arm"] if what in ("base", "config") else reading(line["flags"])', 'line["arm"]', "an arm may have a training set of its own", f"{COMPARE}::test_a_frozen_learning_rate_and_changed_flags_are_noticed"),
    ("delta_lora.py", "if (kind.forward, kind.branch) != (LoRALayer.forward, LoRALayer.branch):", "if False:", "Delta-LoRA moves W under DoRA's norms", f"{DELTA}::test_refusals"),
    ("relatives/rank_scores.py", "if not any(map(any, scores.values())):", "if False:", "ranks are drawn without a word", f"{HETERO}::test_random_choice_is_said"),
    ("support/terminal.py", "    if distributed.world() == 1:  # of several", "    if False:  # of several", "a signal after the last step ends without a word", f"{TRAIN}::test_sigterm_after_the_last_step_is_said"),
    ("tools/peft/writing.py", "        if check:\n            check(new)\n", "", "an adapter with a NaN in its head is exported", f"{PEFT}::test_what_is_not_of_the_runs_model_is_not_exported"),
    ("tools/compare_report.py", "if n >= SEEDS else", "if n >= 2 else", "a verdict from two seeds", f"{COMPARE}::test_a_verdict_needs_ten_seeds"),
    ("tools/compare_report.py", "counts / m, size=draws", "np.full(len(counts), 1 / len(counts)), size=draws", "patterns are drawn as if each were as frequent", f"{COMPARE}::test_interval_over_seeds_and_examples_on_known_numbers"),
    ("tools/compare_report.py", '[100 * line["test"]["accuracy"]', '[100 * line["dev"][-1]["accuracy"]', "the picture is of dev", f"{COMPARE}::test_the_picture_has_a_dot_a_run_and_a_bar_at_the_mean"),
    ("tools/ablation.py", "few = batches[::2] if name", "few = batches if name", "ALPHA-TEST sees every batch", "test_ablation.py::test_every_proxy_scores_the_batches_that_train_py_scores"),
    ("support/writing.py", 's if name == "cider" else 100 * s', "100 * s", "CIDEr is of 100", f"{TEXTS}::test_with_java_all_but_cider_are_of_100"),
    ("relatives/lora_rite.py", "for _, _, g, _, _ in found))", "for _, _, g, _, _ in found[:2]))", "RITE clips by the first module's norm", f"{RULES}::test_rite_clips_by_the_norm_of_all_modules_together"),
    ("relatives/lora_rite.py", "rtol=len(Y) * torch.finfo(Y.dtype).eps", "rtol=0.0", "a rank of rounding errors is a rank", f"{RULES}::test_rite_cuts_off_what_is_a_rank_by_rounding_alone"),
    ("relatives/lora_pro.py", "CUTOFF = 1e-12", "CUTOFF = 1e-6", "small directions are thrown away", f"{RULES}::test_lora_pro_keeps_a_direction_that_is_small"),
    ("relatives/alora.py", "** -0.5", "** 0.5", "new ranks are 36 times too large", f"{ALLOCATORS}::test_a_round_keeps_the_budget_and_the_outputs_of_what_grows"),
    ("relatives/alora.py", "min(2 * r, largest)", "2 * r", "more places than ranks", f"{ALLOCATORS}::test_places_are_no_more_than_a_matrix_has_ranks"),
    ("relatives/exchange.py", "    model.eval()\n", "", "importance under dropout", f"{ALLOCATORS}::test_importance_is_measured_without_dropout"),
    ("relatives/exchange.py", "terms = [proxies.loss_terms(model, batch) for batch in batches]", 'terms = [len(batch["labels"]) for batch in batches]', "a short text counts as much as a long one", f"{ALLOCATORS}::test_importance_does_not_depend_on_how_tokens_are_cut_into_batches"),
    ("relatives/adalora.py", "int(round(keep * self.total, 9))", "int(keep * self.total)", "a rank is lost to float dust", f"{ALLOCATORS}::test_the_last_budget_is_rounded_down"),
    ("relatives/sbora.py", "h = F.dropout(x, self.lora_dropout, self.training) if self.lora_dropout else x\n        # h = base(x) + s", "h = x\n        # h = base(x) + s", "SBoRA without dropout", f"{RELATIVES1}::test_dropout_is_on_all_that_is_added"),
    ("relatives/reslora.py", "x = F.dropout(total, self.lora_dropout, self.training)", "x = total", "ResLoRA without dropout", f"{ADAPTERS2}::test_dropout_is_on_what_a_branch_takes"),
    ("relatives/incompatible.py", '        "--when-off frozen": IN_NEIGHBOURS,\n    },\n    "reslora_middle"', '    },\n    "reslora_middle"', "a frozen module moves", f"{ADAPTERS2}::test_no_refusal_has_gone_missing"),
    ("support/prompts.py", "= TODAY.strftime", "= lambda form: datetime.datetime.now().strftime(form)", "a prompt depends on the day", f"{GENERATION}::test_a_template_gets_what_transformers_gives_it_and_no_date"),
    ("support/run.py", 'and ".lora_" not in name:', "and False:", "any base is as good as another", f"{DOORS}::test_a_run_does_not_go_on_upon_another_base"),
    ("support/run.py", "    if not all(p.isfinite().all() for p in lora.trainable(run.model).values()):\n", "    if False:\n", "a broken last step is saved", f"{TRAIN}::test_a_parameter_that_the_last_step_breaks_is_noticed"),
    ("tools/plot.py", 'if state["on"][name] or frozen:', 'if state["on"][name]:', "a frozen branch counts as W's change", "test_plot.py::test_the_change_out_of_the_files_is_what_the_run_measured"),
    ("support/adapter_file.py", 'metadata = {"adapters": json.dumps(about)}', 'metadata = {"adapters": json.dumps(about), "by": "us"}', "two keys, in either order", f"{LORA}::test_equal_adapters_are_equal_files"),
    ("relatives/expressive_power.py", "A = torch.linalg.solve(below, Vh[piece], left=False)", "A = Vh[piece]", "the layers below are left out", f"{ALLOCATORS}::test_the_error_is_the_next_singular_value"),
    ("relatives/expressive_power.py", "        start += r\n", "", "every layer adds the first piece", f"{ALLOCATORS}::test_the_error_is_the_next_singular_value"),
    # ------------------------------------------------------------------------------------ text tasks
    ("support/texts.py", "label = ([-100] * len(prompt) + answer)", "label = (prompt + answer)", "the prompt is trained on", f"{TEXTS}::test_the_target_alone_is_predicted_and_its_end"),
    ("support/texts.py", "label = ([-100] * len(prompt) + answer)", "label = ([-100] * (len(prompt) + 1) + answer[1:])", "the first token of a target is not trained on", f"{TEXTS}::test_the_target_alone_is_predicted_and_its_end"),
    ("support/texts.py", "add_special_tokens=False).ids + ends[:1]", "add_special_tokens=False).ids", "no end of text is learned", f"{TEXTS}::test_the_target_alone_is_predicted_and_its_end"),
    ("support/texts.py", "found.setdefault(prompt, []).extend(targets)", "found[prompt] = targets", "one reference a prompt, the last", f"{TEXTS}::test_references_are_grouped_by_prompt"),
    ("support/texts.py", 'for s in ("dev", "test") if found.get(s)', 'for s in ("train", "dev", "test") if found.get(s)', "training rows are grouped", f"{TEXTS}::test_references_are_grouped_by_prompt"),
    ("support/texts.py", "range(0, len(ids), length)", "range(0, len(ids), length - 1)", "windows overlap", f"{TEXTS}::test_windows"),
    ("support/texts.py", "parts[i in dev].append(record)", "parts[i in dev].append(record), i in dev and parts[0].append(record)", "what is held out is trained on", f"{TEXTS}::test_a_tenth_of_the_instructions_is_held_out"),
    ("support/texts.py", "if task.chat and form:", "if form:", "every task is asked in the chat template", f"{TEXTS}::test_instructions_are_asked_in_the_chat_template_where_there_is_one"),
    ("support/prompts.py", "key=lambda token: token != own", "key=lambda token: token == own", "another end of text than the template's", f"{TEXTS}::test_the_end_of_text_is_the_one_of_the_template"),
    ("support/glue.py", "label + [-100] * (t - len(label))", "label + [0] * (t - len(label))", "padding is trained on", f"{TEXTS}::test_a_batch_of_a_text_task"),
    ("support/evaluation.py", "for token in label[1:])", "for token in label)", "the first token of a window is counted", f"{TEXTS}::test_perplexity_is_over_all_predicted_tokens"),
    ("support/evaluation.py", "if not label_lists:", "if True:", "a step weighs by examples, not by tokens", f"{TEXT_RUNS}::test_a_step_is_of_the_mean_over_its_predicted_tokens"),
    ("support/evaluation.py", "        terms += n\n", "        terms += len(part)\n        total += model(**batch).loss.item() * (len(part) - n)\n", "perplexity weighs by examples", f"{TEXTS}::test_perplexity_is_over_all_predicted_tokens"),
    ("support/evaluation.py", 'if name == "loss" else', 'if name == "-" else', "the largest loss is the best", f"{TEXTS}::test_what_is_better"),
    ("support/evaluation.py", "distributed.sum_numbers([total, float(terms)])", "[total, float(terms)]", "each process has a perplexity of its own", f"{TEXT_RUNS}::test_two_processes_equal_one"),
    ("support/writing.py", "lowercase=True", "lowercase=False", "capitals count in BLEU", f"{TEXTS}::test_bleu_in_lower_case_over_all_references_of_a_prompt"),
    ("support/writing.py", "for i in range(most)", "for i in range(1)", "BLEU against the first reference alone", f"{TEXTS}::test_bleu_in_lower_case_over_all_references_of_a_prompt"),
    ("support/writing.py", "return [parts[i] for i in range(len(prompts))]", "return list(parts.values())", "answers beside other prompts", f"{TEXTS}::test_answers_are_those_of_each_prompt_alone"),
    ("tools/generate.py", "if args.plain or task not in texts.TASKS:", "if True:", "a run is asked otherwise than it was trained", f"{TEXT_RUNS}::test_generate_asks_as_the_run_was_trained"),
    ("support/large.py", ' or module.endswith("norm")', "", "norms in bfloat16", f"{LARGE}::test_what_is_in_which_dtype"),
    ("support/large.py", '"lora_" in name or ', "", "pairs in bfloat16", f"{LARGE}::test_adapters_begin_as_beside_a_float32_base"),
    ("support/large.py", " or module in head", "", "a head that trains in bfloat16", f"{LARGE}::test_what_is_in_which_dtype"),
    ("support/large.py", "            norm.register_forward_pre_hook(widened)", "            pass", "heads of q and k are normalised in bfloat16", f"{LARGE}::test_what_is_in_which_dtype"),
    ("support/large.py", "return result.to(wide(result)[1])", "return result", "logits in bfloat16", f"{LARGE}::test_equals_the_float32_model_of_the_rounded_weights"),
    ("support/large.py", "return tensor.device, torch.promote_types(tensor.dtype, torch.float32)", "return tensor.device, tensor.dtype", "A is rounded as its base is", f"{LARGE}::test_adapters_begin_as_beside_a_float32_base"),
    ("support/large.py", "torch.float32).base.to(like)", "torch.float32)", "an adapted weight is back in float32", f"{LARGE}::test_adapters_begin_as_beside_a_float32_base"),
    ("support/large.py", "torch.autocast(x.device.type, enabled=False)", "torch.autocast(x.device.type, torch.bfloat16)", "the lazy change is taken in bfloat16", f"{LARGE}::test_a_small_change_survives_the_lazy_form"),
    ("support/large.py", "if weight.dtype != factor.dtype or weight.dtype not in (torch.float32, torch.float64):", "if False:", "B A is merged into bfloat16", f"{LARGE}::test_merging_into_bf16_is_refused_and_into_its_numbers_in_float32_exact"),
    ("support/large.py", 'if hasattr(weight, "to_local"):', "if False:", "a part of a weight is merged into", f"{LARGE}::test_what_a_sharded_base_cannot_do_is_refused"),
    ("support/large.py", "if name in READ_WHOLE and is_sharded(model):", "if False:", "a sharded model is scored by what needs all of it", f"{LARGE}::test_what_a_sharded_base_cannot_do_is_refused"),
    ("support/large.py", "reshard_after_forward=True", "reshard_after_forward=False", "blocks stay whole after the forward pass", f"{LARGE}::test_what_each_process_holds"),
    ("support/large.py", "if stays_wide(name)}", 'if "lora_" in name}', "norms are sharded", f"{LARGE}::test_what_each_process_holds"),
    ("support/large.py", "    if alone and not resumed:", "    if alone:", "a sharded run cannot go on alone", f"{LARGE}::test_a_sharded_run_stops_resumes_alone_and_exports"),
    ("train.py", '"shortcut_alpha", "seed", "when_off")', '"shortcut_alpha", "when_off")', "the seed does not reach A", f"{TRAIN}::test_the_seed_reaches_the_head_the_pairs_the_order_and_new_ranks"),
    ("train.py", '"dropout", "seed", "shortcut_norm"', '"dropout", "shortcut_norm"', "the seed does not reach the head", f"{TRAIN}::test_the_seed_reaches_the_head_the_pairs_the_order_and_new_ranks"),
    ("model.py", "p = self.config.dropout if self.training else 0.0", "p = 0.0", "attention does not drop out", f"{MODEL}::test_where_the_backbone_drops_out"),
    ("support/evaluation.py", "getattr(run, split)", "run.dev", "the test result of a text task is dev's", f"{TEXTS}::test_a_split_is_measured_on_itself"),
    ("tools/compare.py", '"test": done[0]["test"]', '"test": done[0]["dev"]', "a study reports dev as test", f"{COMPARE}::test_a_line_says_what_the_run_said"),
    ("tools/compare_report.py", "verdict(seeds, both)", "verdict(seeds)", "a verdict from one interval", f"{COMPARE}::test_a_verdict_needs_both_intervals"),
    ("relatives/lora_pro.py", "(x.double() for x in (A, B, grad_A, grad_B))", "(A, B, grad_A, grad_B)", "LoRA-Pro solves in float32", f"{RULES}::test_lora_pro_solves_in_float64_what_is_float32"),
    ("support/generation.py", "with torch.no_grad():", "with torch.inference_mode():", "a sharded model that was measured cannot train", f"{LARGE}::test_a_sharded_model_that_was_measured_first_trains"),
    ("lora.py", "if name not in set(names_of(model, set(PLACES))):", "if False:", "an adapter file puts a module anywhere", f"{LORA}::test_adapter_files_that_do_not_fit_leave_the_model_as_it_was"),
    ("support/large.py", "    if sharded and not alone:\n        shard(model, device)\n", "", "nothing is sharded", f"{LARGE}::test_shares_that_differ_in_length_keep_step"),
    ("support/distributed.py", "        yield items[0], 0", "        yield items[0], 1", "what keeps step is counted", f"{LARGE}::test_every_process_takes_part_equally_often"),
    ("support/distributed.py", "(indices[:1], 0)", "(indices[:1], 1)", "an example that keeps step is counted", f"{LARGE}::test_every_process_takes_part_equally_often"),
    ("support/distributed.py", "else [*mine, items[0]]", "else mine", "a process has one prediction less to make", f"{LARGE}::test_every_process_takes_part_equally_often"),
    ("train.py", "once * counted(examples) / total", "counted(examples) / total", "a batch of one is trained on twice", f"{LARGE}::test_two_processes_with_half_a_base_each_equal_one"),
    ("proxies.py", "torch.zeros_like(p, dtype=large.wide(p)[1])", "torch.zeros_like(p)", "gradients of bfloat16 weights are summed in bfloat16", f"{LARGE}::test_scores_on_a_base_in_bf16"),
    ("proxies.py", "totals[j] += once * ", "totals[j] += ", "fisher: an example that keeps step counts", f"{LARGE}::test_a_sharded_language_model_is_the_whole_one"),
    ("proxies.py", "(once * loss_terms(model, batch) / total)\n        gradients", "(loss_terms(model, batch) / total)\n        gradients", "a batch that keeps step is scored twice", f"{LARGE}::test_a_sharded_language_model_is_the_whole_one"),
    ("model.py", 'in_base_dtype("embed", "encode"', 'in_base_dtype("encode"', "the residual stream in bfloat16", f"{LARGE}::test_what_is_in_which_dtype"),
    ("delta_lora.py", "        large.refuse_to_move(name, weight)\n", "", "a part of a weight moves", f"{LARGE}::test_what_a_sharded_base_cannot_do_is_refused"),
    ("relatives/dora.py", "base.weight.detach().to(*large.wide(base.weight)).norm", "base.weight.detach().norm", "DoRA's magnitude is rounded to bfloat16", f"{LARGE}::test_relatives_on_a_base_in_bf16"),
    ("relatives/dora.py", ", torch.autocast(A.device.type, enabled=False):", ":", "DoRA's norms are of a V rounded to bfloat16", f"{LARGE}::test_doras_norm_is_that_of_the_unrounded_weight"),
    ("support/settings.py", 'moves and a.base_dtype == "bf16",', "False,", "weights in bfloat16 move", f"{SETTINGS}::test_what_would_do_nothing_is_refused"),
    ("support/settings.py", 'moves and a.shard == "yes",', "False,", "sharded weights move", f"{SETTINGS}::test_what_would_do_nothing_is_refused"),
    ("support/run.py", ', "test": run.test}', "}", "a run goes on with another test set", f"{DOORS}::test_a_run_keeps_its_test_set"),
    ("support/run.py", "json.dumps(about, sort_keys=True).encode()", 'b""', "a run goes on with another config.json", f"{DOORS}::test_a_run_does_not_go_on_upon_another_base"),
    ("support/checkpoint.py", "(key in found or key in SETTINGS)", "key in found", "a checkpoint's group without its weight decay", f"{DOORS}::test_a_checkpoint_of_a_torch_that_lacks_a_setting_is_one_of_this_run"),
    ("support/terminal.py", '["--test"] if args.test and not before.get("test") else []', "[]", "the command that goes on has lost --test", "test_train.py::test_the_command_that_goes_on_has_what_was_given_beside_resume"),
    ("support/glue.py", 'model == "minilm" or k == "words alone"', "True", "MiniLM's head beside another model", "test_glue.py::test_what_stands_beside_a_result_was_measured_alike"),
    ("relatives/reslora.py", "if len(self.passed) != self.n:", "if False:", "a block is called again in silence", f"{ADAPTERS2}::test_a_block_that_is_called_out_of_turn_is_refused"),
    ("relatives/reslora.py", "        x = F.dropout(x, self.lora_dropout, self.training)\n        return F.linear(x, self.branch()[0])", "        x = F.dropout(x, self.lora_dropout, self.training)\n        return F.linear(x, self.lora_A)", "what is off and frozen trains through its neighbours", f"{ADAPTERS2}::test_what_is_off_and_frozen_hands_on_without_a_gradient"),
    ("relatives/exchange.py", "if own else 0.0", "if own else -1e9", "a module without a rank is the last to get one", f"{ALLOCATORS}::test_a_module_that_holds_no_rank_is_the_first_to_get_one"),
    ("support/run_folder.py", '"+changes" * bool(changed)', '""', "a line's commit is of other code", f"{DOORS}::test_a_run_says_its_commit_and_what_is_not_in_it"),
    ("tools/compare.py", "places[-1] - places[0] >= len(places)", "False", "a best rate has neighbours that were not tried", f"{COMPARE}::test_bad_studies_are_one_line"),
    ("tools/compare_report.py", "if abs(found.mean() - told) > 1e-6:", "if False:", "a table and a difference tell of other predictions", f"{COMPARE}::test_report_needs_nothing_but_the_lines"),
    ("support/tasks.py", "classes = name in glue.TASKS and splits[0]", "classes = name in glue.TASKS", "no class is counted in a split that is not there", "test_glue.py::test_train_records_of_one_label_alone_are_refused"),
    ("support/evaluation.py", "if None in by_index.values():", "if False:", "NaN is class 0", "test_evaluation.py::test_outputs_that_are_not_finite_are_no_predictions"),
    ("support/evaluation.py", "if not math.isfinite(loss):", "if False:", "a perplexity of NaN", "test_evaluation.py::test_outputs_that_are_not_finite_are_no_predictions"),
    ("support/glue.py", "    tokenizer.no_padding()", "    pass", "what a tokenizer pads is attended to", "test_glue.py::test_encode_truncates_the_longer_text_first_and_leaves_the_tokenizer"),
    ("support/glue.py", "        if truncation:\n", "        if False:\n", "a tokenizer loses its truncation", "test_glue.py::test_encode_truncates_the_longer_text_first_and_leaves_the_tokenizer"),
    ("support/doors.py", "if not (labels[:, 1:] != -100).any():", "if False:", "a batch without a token to predict", f"{DOORS}::test_batches_at_the_edge_of_what_is_allowed"),
    ("support/generation.py", "if mask.shape != input_ids.shape:", "if False:", "a mask of other prompts", "test_generation.py::test_what_is_refused"),
    ("support/run_folder.py", "    refuse_filled(folder)  # before", "    pass  # before", "a lock in a folder that is refused", f"{TRAIN}::test_folders_that_are_not_runs"),
    ("support/texts.py", "header.count(c) > 1", "header.count(c) > 2", "of two columns of one name the last", "test_texts.py::test_broken_files_are_refused_in_one_line"),
    ("support/settings.py", "== len(plan.costs)", "== 0", "nothing is said where rounding keeps all", f"{SETTINGS}::test_what_the_sizes_cut_short_is_said"),
    ("tools/peft/commands.py", "    if extra:\n", "    if False:\n", "what comes in does not load again", "test_peft.py::test_what_comes_in_loads_again_or_is_refused"),
    ("tools/peft/config.py", "(whole or not only or", "(not only or", "layers_to_transform is asked of a full path", "test_peft.py::test_what_comes_in_loads_again_or_is_refused"),
    ("tools/ablation.py", '{"data": settings["data"], **record["settings"]}', '{**record["settings"], "data": settings["data"]}', "importance of one data set beside scores of another", "test_ablation.py::test_an_interrupted_run_goes_on_and_repeats_nothing"),
    ("tools/oracle/check.py", "got.is_complex()", "False", "an imaginary part is no error", "test_oracle.py::test_odd_results_are_failures_and_not_the_end_of_the_table"),
]
# fmt: on


def applied(mutant):
    """The file's source with a mutant of MUTANTS, or None where the edit no longer fits."""
    file, old, new = mutant[:3]
    source = (ROOT / file).read_text()
    return source.replace(old, new, 1) if source.count(old) == 1 else None


def start(root, job, report):
    """Write a job's source into the copy at root, fork a process that runs its tests; its pid."""
    (root / job.file).write_text(job.source)
    pid = os.fork()
    if pid:
        return pid
    code = 3  # pytest's own for what went wrong inside it
    try:
        signal.alarm(WAIT * job.seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (job.seconds, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
        os.chdir(root)
        sys.path.remove(str(ROOT / "tests"))
        sys.dont_write_bytecode = True
        os.dup2(report.fileno(), 1)
        os.dup2(report.fileno(), 2)
        for tests in filter(None, (job.tests[:1], job.tests[1:])):  # most die in the first file
            tests = [f"tests/{t}" for t in tests]
            code = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests])
            if code:
                break
    finally:
        sys.stdout.flush()
        os._exit(int(code))


def verdict(status, report):
    """What became of a job, in words."""
    code = os.waitstatus_to_exitcode(status)
    report.seek(0)
    if code == 0:
        return "SURVIVED"
    if code in (-signal.SIGALRM, -signal.SIGXCPU):
        return "killed: no end in sight"
    text = report.read()
    if by := re.search(r"^(?:FAILED|ERROR) \S*?(test_\w+\.py::\w+)", text, re.M):
        return f"killed by {by[1]}"
    if by := re.search(r"^ERROR \S*?(test_\w+\.py)", text, re.M):
        return f"broken: {by[1]} cannot be imported"
    if re.search(r"^INTERNALERROR> SystemExit", text, re.M):
        return "broken: it ends when it is imported"
    return f"NOT TESTED: pytest ended with {code}"


def tested(jobs, processes):
    """Run the jobs of a list, first to last, while others may change it; yields (job, verdict)."""
    running = {}
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", ".*_cache", ".hypothesis")
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / f"copy{i}" for i in range(processes)]
        for copy in copies:
            shutil.copytree(ROOT, copy, ignore=ignored)
            shutil.rmtree(copy / "__pycache__", ignore_errors=True)  # of the files that are edited
        while jobs or running:
            while jobs and copies:
                job, root = jobs.pop(0), copies.pop()
                report = open(root / "report.txt", "w+")  # noqa: SIM115  closed when it is read
                running[start(root, job, report)] = job, root, report
            pid, status = os.wait()
            job, root, report = running.pop(pid)
            shutil.copy(ROOT / job.file, root / job.file)
            copies.append(root)
            with report:
                said = verdict(status, report)
            yield job, said


# ------------------------------------------------------------------------------- of a list, or drawn


def from_the_list(words, processes):
    """Every mutant of MUTANTS; the exit code."""
    chosen = [m for m in MUTANTS if not words or any(w in m[3] or w in m[0] for w in words)]
    jobs, killed = [], 0
    for mutant in chosen:
        if source := applied(mutant):
            jobs.append(Job(mutant[0], source, [mutant[4]], mutant[3]))
        else:
            print(f"{mutant[0]:<28}{mutant[3]:<52}DOES NOT APPLY", flush=True)
    for job, said in tested(jobs, processes):
        killed += said.startswith("killed")
        print(f"{job.file:<28}{job.about:<52}{said}", flush=True)
    print(f"{killed} of {len(chosen)} killed", end="")
    return 1 if killed < len(chosen) or not chosen else 0


def draw_all(words):
    """Every mutant that drawn_mutants finds in the root files.

    Returns:
        list of (file, mutant, (file, function, line before, line after, n)), where the last without
        n is as in survivors.txt, and n counts those that are alike in all this.
    """
    found, alike = [], collections.Counter()
    for file in CONCERNED:
        source = (ROOT / file).read_text()
        for mutant in drawn_mutants.draw(source):
            key = file, mutant.where, *mutant.lines(source)
            alike[key] += 1
            if not words or any(w in text for w in words for text in (*key, mutant.what)):
                found.append((file, mutant, (*key, alike[key])))
    return found


def recorded(path):
    """{key: verdict} of the mutants that a record holds as noticed: a line of JSON for each.

    Not those that were noticed by a test which is no longer there.
    """
    if not path or not path.exists():
        return {}
    there = {
        f"{file.name}::{name}"
        for file in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        tuple(key): said
        for *key, said in lines
        if said.startswith("broken")
        or (said.startswith("killed") and {*re.findall(r"test_\w+\.py::test_\w+", said)} <= there)
    }


def systematic(words, sample, seed, processes, minutes, first=None, record=None):
    """Mutants that are drawn, in a random order, as many as there is time for; the exit code.

    First the tests that concern the file, the likeliest first; what survives these meets all the
    others, unless only the first few files of tests are wanted. At last every test that killed one is
    run without any edit: it must pass. What is listed as no mistake is not run, nor what a record
    holds as noticed; what is run now joins the record.
    """
    found, end = draw_all(words), time.monotonic() + 60 * minutes
    known = drawn_mutants.listed(SURVIVORS.read_text())
    random.Random(seed).shuffle(found)
    found, before = found[:sample], recorded(record)
    done = {key: before[key] for *_, key in found if key in before}
    done.update({key: "listed" for *_, key in found if key[:4] in known})
    source = {file: (ROOT / file).read_text() for file in CONCERNED}
    tests = {file: names[:first] for file, names in CONCERNED.items()}
    jobs = [
        Job(f, m.apply(source[f]), tests[f], (m, key)) for f, m, key in found if key not in done
    ]
    counts = collections.Counter(said[:6] for said in done.values())
    killers = {said.split()[-1] for said in done.values() if said.startswith("killed by")}
    for job, said in tested(jobs, processes):
        mutant, key = job.about
        if said == "SURVIVED" and job.tests is tests[job.file] and not first:
            print(f"{job.file}:{mutant.line} {key[2]} -> {key[3]}: to all tests", flush=True)
            jobs.insert(0, job._replace(tests=others(job.tests), seconds=5 * SECONDS))
            continue
        counts[re.match(r"\w+", said)[0]] += 1
        killers.update(re.findall(r"^killed by (\S+)", said))
        if record:
            with open(record, "a") as file:
                file.write(json.dumps([*key, said]) + "\n")
        print(f"{job.file}:{mutant.line} {mutant.where}: {mutant.what}: {said}", flush=True)
        if not said.startswith(("killed", "broken")):
            print(f"- {key[2]}\n+ {key[3]}", flush=True)
        if time.monotonic() > end:
            jobs[:] = [job for job in jobs if job.tests is not tests[job.file]]
    killed = counts["killed"] + counts["broken"]  # so that it cannot be imported: noticed
    print(
        f"{len(found)} drawn, {counts.total()} reached in time: {killed} killed, "
        f"{counts['listed']} listed, {counts['SURVIVED']} survived, {counts['NOT']} not tested",
        end="",
    )
    file = next(iter(CONCERNED))
    unchanged = [Job(file, source[file], sorted(killers), None, 5 * SECONDS)] if killers else []
    for _, said in tested(unchanged, 1):
        if said != "SURVIVED":
            print(f"; but without any edit: {said}", end="")
            return 1
    return 0 if counts.total() and not counts["SURVIVED"] + counts["NOT"] else 1


def others(tests):
    """The files of tests that are left when some have been run, without those of SKIPPED."""
    files = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    return [name for name in files if name not in (*tests, *SKIPPED)]


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants that hold one of them")
    parser.add_argument("--systematic", action="store_true", help="draw mutants")
    parser.add_argument("--sample", type=int, help="how many of those that are drawn; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the order in which they are drawn")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no mutant later")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--first", type=int, help="only so many files of the tests that concern a file, no others"
    )
    parser.add_argument(
        "--record", type=Path, help="file of those that are done: what was noticed is not run again"
    )
    args = parser.parse_args(argv)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # loads the rest of torch
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    gc.freeze()  # so that no process looks through all this again
    started = time.monotonic()
    if args.systematic:
        code = systematic(
            args.words,
            args.sample,
            args.seed,
            args.processes,
            args.minutes,
            args.first,
            args.record,
        )
    else:
        code = from_the_list(args.words, args.processes)
    print(f", {time.monotonic() - started:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
