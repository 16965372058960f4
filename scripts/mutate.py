#!/usr/bin/env python3
"""Breaks the package on purpose, one line at a time, and says whether a test notices.

    python scripts/mutate.py [--list] [--only NAME ...] [--no-baseline]

Every mutant of ``MUTANTS`` replaces one snippet of one file of a copy of the package, in a
temporary folder; only the tests that should notice are run there. Each is

    killed          a test fails, or does not come to an end
    survived        all pass: the line could be wrong, and nobody would know
    does not apply  the snippet is not in the file exactly once, or the tests could not be run: mend
                    the table

First the named tests run once on the package as it is, because what fails anyway proves nothing
(``--no-baseline`` leaves that out). Ends with 1 where a mutant survives or does not apply. About
a quarter of an hour on two cores. Tests that pin numbers (`tests/expression/test_pins.py`) notice
nearly everything and say nothing about what is right: they are not named here.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
COPIED = ("genemodel", "configs", "tests", "scripts", "pyproject.toml")
# A loop that does not end any more is noticed, too; the slowest test takes a fifth of it.
LONGEST_S = 300.0
# Of pytest: some tests failed. Others mean that it did not come to run them.
PASSED, FAILED = 0, 1


@dataclass(frozen=True)
class Mutant:
    """One edit.

    Attributes
    ----------
    name
        By which it is called.
    file
        Within the package.
    old, new
        Snippet that occurs once in the file, and what takes its place.
    breaks
        What is wrong then.
    tests
        Nodes of pytest that should notice.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    def applied_to(self, text: str) -> str | None:
        """Return the text of the file with the edit; None where the snippet is not there once."""
        return text.replace(self.old, self.new) if text.count(self.old) == 1 else None


def mutant(name: str, file: str, old: str, new: str, breaks: str, *tests: str) -> Mutant:
    return Mutant(name, file, old, new, breaks, tuple(f"tests/{test}" for test in tests))


MUTANTS = (
    # -- what users bring ------------------------------------------------------------------------
    mutant(
        "missing-words", "cells/missing_labels.py",
        "return plain(text) in words", "return plain(text) in EMPTY",
        "Unknown and unassigned are learnt as cell types",
        "cells/test_missing_labels.py::test_labels_are_learnt_as_if_the_value_were_missing",
    ),
    mutant(
        "features-all", "cells/contract.py",
        "column_G = None if kept_G is None else np.flatnonzero(kept_G)", "column_G = None",
        "peaks and antibodies are genes",
        "cells/test_features.py::test_every_container_gives_the_genes_alone",
    ),
    mutant(
        "number-names", "cells/contract.py",
        "genes = _named(genes, where, column)", "genes = genes",
        "numbers are gene names although a column holds names",
        "genes/test_recognition.py::test_the_column_of_names_is_found_under_any_name",
    ),
    mutant(
        "appended-names", "genes/match.py",
        "if found.row_G[first] >= 0:", "if False:",
        "counts of GENE-1 are lost",
        "genes/test_recognition.py::test_counts_of_names_made_unique_are_summed_into_their_gene",
    ),
    mutant(
        "names-alike", "cells/source_names.py",
        "while name in used:", "while False:",
        "two objects in memory become one data set",
        "cells/test_source_names.py::test_as_many_folders_as_tell_them_apart",
    ),
    mutant(
        "table-turned", "cells/sources_text.py",
        "return rows > columns", "return False",
        "a table with genes as rows is read as one of cells",
        "cells/test_layouts.py::test_genes_as_rows_are_seen",
    ),
    mutant(
        "round-silent", "cells/contract.py",
        "notes += (_rounding(rows, finding),)", "pass",
        "counts are rounded without a word",
        "cells/test_layouts.py::test_fractions_beside_whole_numbers_are_rounded_on_request_and_it_is_said",
    ),
    # -- tokens, packing, order --------------------------------------------------------------------
    mutant(
        "medians-kernel", "batches/tokens.py",
        "value[i] = np.float32(count[i]) * inverse_median_V[gene[i]]",
        "value[i] = np.float32(count[i])",
        "genes are ranked by counts alone, their medians ignored",
        "batches/test_tokens.py::test_radix_ranking_equals_the_slow_oracle",
    ),
    mutant(
        "medians-ones", "batches/loader.py",
        "return (1.0 / _known(medians_V)).astype(np.float32)",
        "return np.ones_like(medians_V, dtype=np.float32)",
        "the ranking of a corpus ignores the medians",
        "batches/test_loader.py::test_genes_are_ranked_by_their_counts_over_their_medians",
    ),
    mutant(
        "value-depth", "batches/tokens.py",
        "log_of[small] = np.log1p(np.float32(small) * scale)",
        "log_of[small] = np.log1p(np.float32(small))",
        "small counts become values without regard to the library",
        "batches/test_tokens.py::test_packed_cells_keep_values_and_open_with_the_cell_token",
    ),
    mutant(
        "bins-full", "batches/packing.py",
        "length_C[node - 1] > room", "length_C[node - 1] > budget",
        "micro-batches overflow their budget",
        "batches/test_packing.py::test_every_cell_is_in_exactly_one_bin_within_budget",
    ),
    mutant(
        "deal-unsorted", "batches/packing.py",
        "longest_first[i::pieces]", "np.arange(len(length_C))[i::pieces]",
        "pieces of a micro-batch differ in tokens",
        "train/test_memory.py::test_pieces_are_alike_in_cells_and_in_tokens",
    ),
    mutant(
        "epoch-blocks", "batches/order.py",
        "_permuted_blocks(self.seed, self.epoch, self.n_blocks)",
        "_permuted_blocks(self.seed, 0, self.n_blocks)",
        "the same cells meet in a window in every epoch",
        "batches/test_order.py::test_windows_of_another_epoch_hold_other_cells",
    ),
    mutant(
        "epoch-within", "batches/order.py",
        "_generator(self.seed, self.epoch, window + 1)", "_generator(self.seed, self.epoch, 1)",
        "every window is shuffled alike",
        "batches/test_order.py::test_windows_are_shuffled_each_in_its_own_way",
    ),
    mutant(
        "lanes-from-zero", "batches/loader.py",
        "lane = lanes[(begin + step) % ring]", "lane = lanes[step % ring]",
        "a run goes on in another lane than the one whose turn it is",
        "batches/test_loader.py::test_a_position_is_valid_for_any_world_size",
    ),
    mutant(
        "ranks-alike", "batches/loader.py",
        "if step % world == self.rank:", "if step % world == 0:",
        "all ranks train on the same cells",
        "batches/test_loader.py::test_the_global_sequence_does_not_depend_on_the_world_size",
    ),
    mutant(
        "split-seed", "corpus/split.py",
        'f"{seed}\\0{name}".encode()', 'f"{name}".encode()',
        "the seed of the hold-out does nothing",
        "corpus/test_split.py::test_another_seed_holds_out_other_groups",
    ),
    mutant(
        "split-by-cell", "corpus/split.py",
        "out_C = np.isin(codes_C, sorted(held))",
        "out_C = np.isin(codes_C, sorted(held)) & (np.arange(len(codes_C)) % 2 == 0)",
        "half of the cells of held-out donors are trained on",
        "corpus/test_split.py::test_a_split_is_complete_and_no_group_straddles",
    ),
    # -- model and objectives ----------------------------------------------------------------------
    mutant(
        "species-vector", "model/gene_model.py",
        "cell_CD = self.species(batch.species_C) +",
        "cell_CD = 0.0 * self.species(batch.species_C) +",
        "the model does not know the species",
        "model/test_gene_model.py::test_the_cell_has_its_species_and_depth_from_vectors_of_their_own",
    ),
    mutant(
        "depth-vector", "model/gene_model.py",
        "self.depth(torch.log1p(batch.library_C))",
        "self.depth(torch.log1p(0 * batch.library_C))",
        "the model does not know the depth",
        "model/test_gene_model.py::test_the_cell_has_its_species_and_depth_from_vectors_of_their_own",
    ),
    mutant(
        "hidden-seen", "heads/masking.py",
        "torch.full_like(keep_M, HIDDEN_VALUE), keep_M", "keep_M + 0.0, keep_M",
        "hidden values are seen",
        "heads/test_pretraining.py::test_a_hidden_value_and_a_hidden_gene_do_not_leak",
    ),
    mutant(
        "mask-address", "heads/pretraining.py",
        "uniform_T = uniform_at(key, cell_T, batch.gene_T)",
        "uniform_T = uniform_at(key, batch.segment_T, batch.gene_T)",
        "what is hidden depends on the place in the micro-batch",
        "heads/test_pretraining.py::test_masks_do_not_depend_on_packing",
    ),
    mutant(
        "mask-epoch", "heads/pretraining.py",
        "epoch = -1 if validation else batch.epoch", "epoch = -1",
        "the same tokens are hidden in every epoch",
        "heads/test_pretraining.py::test_epochs_hide_other_tokens_and_validation_always_the_same",
    ),
    mutant(
        "mask-validation", "heads/pretraining.py",
        "epoch = -1 if validation else batch.epoch", "epoch = batch.epoch",
        "looks at held-out cells are not comparable",
        "heads/test_pretraining.py::test_epochs_hide_other_tokens_and_validation_always_the_same",
    ),
    mutant(
        "batch-dropout", "heads/pretraining.py",
        "batch.cell_C) >= self.batch_dropout", "batch.cell_C) >= 0.0",
        "the decoder is always told the batch",
        "heads/test_pretraining.py::test_the_batch_is_hidden_from_its_share_of_cells_in_training_only",
    ),
    mutant(
        "unknown-batch", "heads/decode_counts.py",
        ".masked_fill((batch_C < 0)[:, None], 0.0)", "",
        "cells of an unknown batch are decoded as those of the first",
        "heads/test_pretraining.py::test_an_unknown_batch_has_no_part_in_the_rates",
    ),
    mutant(
        "value-padding", "heads/masked_value.py",
        "loss = (loss_M * real_M).sum()", "loss = loss_M.sum()",
        "padding is part of the loss",
        "heads/test_pretraining.py::test_places_that_are_padding_cost_nothing",
    ),
    mutant(
        "gene-padding", "heads/masked_gene.py",
        "torch.nonzero(real_M & (species_M == s))", "torch.nonzero(species_M == s)",
        "padding is part of the loss of masked genes",
        "heads/test_pretraining.py::test_places_that_are_padding_cost_nothing",
    ),
    mutant(
        "decode-panel", "heads/decode_counts.py",
        "measured_CV = self.measured_XV[panel_C] & real_C[:, None]",
        "measured_CV = (self.measured_XV[panel_C] | True) & real_C[:, None]",
        "genes that a panel did not measure count as zeros",
        "heads/test_pretraining.py::test_unmeasured_genes_cost_nothing",
    ),
    # -- the training loop -------------------------------------------------------------------------
    mutant(
        "objective-weights", "train/loop.py",
        "scale_K = (self._weight_K() * exchange.factor", "scale_K = (exchange.factor",
        "weights of objectives do nothing to the gradient",
        "train/test_loop.py::test_the_gradient_of_a_step_is_that_of_all_its_micro_batches",
    ),
    mutant(
        "gradient-kept", "train/loop.py",
        "optimiser.zero_grad(set_to_none=True)", "pass",
        "gradients of earlier steps are added",
        "train/test_loop.py::test_the_gradient_of_a_step_is_that_of_all_its_micro_batches",
    ),
    mutant(
        "clip-off", "train/loop.py",
        "exchange.clip_(self.optim.clip)", "exchange.clip_(0.0)",
        "the gradient is not clipped",
        "train/test_loop.py::test_the_gradient_is_clipped_and_its_norm_said_before",
    ),
    mutant(
        "full-passes-off", "integration/head.py",
        "min(n_cells, self.full_passes)", "n_cells",
        "a million cells take an hour",
        "integration/test_integration.py::test_above_full_passes_more_cells_take_no_more_steps",
    ),
    mutant(
        "halves-unasked", "annotation/label_head.py",
        "temperature = max(temperature, temperature_for(log_CL[seen_C], asked))", "pass",
        "another species is labelled as surely as the reference's own",
        "annotation/test_label_head.py"
        "::test_another_species_is_labelled_alike_but_with_less_confidence",
    ),
    mutant(
        "private-anything", "integration/private_populations.py",
        "            if not private:\n", "            if False:\n",
        "populations that others have too are called private",
        "integration/test_private_populations.py"
        "::test_what_others_have_too_and_what_lies_apart_raise_no_alarm",
    ),
    mutant(
        "shift-unproven", "embedding/between_batches.py",
        "(evidence_N >= LEAST_EVIDENCE)[:, None]", "(evidence_N >= 0)[:, None]",
        "a batch that shares nothing is moved all the same",
        "embedding/test_between_batches.py"
        "::test_batches_of_other_types_without_an_effect_stay_where_they_are",
        "embedding/test_between_batches.py"
        "::test_a_batch_that_shares_nothing_stays_and_is_named",
    ),
    mutant(
        "dropout-seed", "train/loop.py",
        "hash((self.seed, number))", "hash((self.seed,))",
        "the same dropout at every step and rank",
        "train/test_loop.py::test_dropout_of_every_micro_batch_has_an_address_of_its_own",
    ),
    mutant(
        "dropout-rank", "train/loop.py",
        "number = first + i * exchange.world + exchange.rank",
        "number = first + i * exchange.world",
        "the same dropout on every rank",
        "train/test_exchange_definitions.py::test_two_ranks_descend_as_one_does_alone_dropout_included",
    ),
    mutant(
        "ddp-scale", "train/exchange.py",
        'return float(self.world) if self.kind in ("ddp", "fsdp") else 1.0', "return 1.0",
        "the gradient of ranks is averaged, not added",
        "train/test_exchange_definitions.py::test_two_ranks_descend_as_one_does_alone_dropout_included",
    ),
    mutant(
        "ordered-sum", "train/exchange.py",
        "for part in parts:\n                    total += part", "total += sum(reversed(parts))",
        "ordered sums depend on the number of ranks",
        "train/test_exchange_definitions.py::test_ordered_sums_go_by_rank_within_micro_batch",
    ),
    mutant(
        "finite-check", "train/guard.py",
        "if not math.isfinite(x) or abs(x) >= LARGEST", "if False",
        "a step that is not finite is applied",
        "train/test_guard_definitions.py", "train/test_guard.py",
        "train/test_loop.py::test_a_step_that_is_not_finite_is_left_out",
    ),
    mutant(
        "jump-mean", "train/guard.py",
        "away <= self.deviations", "away <= 10 * self.deviations",
        "jumps of the loss are let through",
        "train/test_guard_definitions.py", "train/test_guard.py",
    ),
    mutant(
        "skip-applies", "train/loop.py",
        "return self._refuse(policy, wrong, cells, position)",
        "self._refuse(policy, wrong, cells, position)",
        "a step that was to be left out changes the weights",
        "train/test_loop.py::test_a_step_that_is_not_finite_is_left_out",
    ),
    mutant(
        "rate-shares", "train/loop.py",
        'group["lr"] = self.lr * group.get("share", 1.0)', 'group["lr"] = self.lr',
        "all layers learn at one rate",
        "train/test_start.py::test_rates_follow_the_shares",
    ),
    mutant(
        "look-last", "train/loop.py",
        "for row in in_order:\n            total += row",
        "for row in in_order:\n            total = row",
        "held-out losses are those of the last micro-batch",
        "train/test_loop.py::test_held_out_losses_are_sums_over_all_micro_batches_by_all_items",
    ),
    mutant(
        "patience", "train/loop.py",
        "progress.since_best = 0 if found",
        "progress.since_best = progress.since_best if found",
        "early stopping counts looks since the beginning",
        "train/test_loop.py::test_looks_without_improvement_are_counted_since_the_best",
    ),
    mutant(
        "best-forgotten", "train/loop.py",
        'saved = dict(state["progress"])',
        'saved = {k: v for k, v in state["progress"].items() if k != "best"}',
        "a resumed run takes any look for the best",
        "train/test_loop.py::test_a_run_that_goes_on_knows_all_that_it_knew",
    ),
    mutant(
        "guard-forgotten", "train/loop.py",
        'self.guard.load(state["guard"])', "pass",
        "a resumed run forgets which losses are usual",
        "train/test_loop.py::test_a_run_that_goes_on_knows_all_that_it_knew",
    ),
    mutant(
        "moments-forgotten", "train/exchange.py",
        "optimiser.load_state_dict(saved)", "pass",
        "a resumed run begins with new moments",
        "train/test_loop.py::test_a_run_that_goes_on_knows_all_that_it_knew",
    ),
    mutant(
        "checkpoint-alias", "train/checkpoint.py",
        'source.to("cpu", copy=True)', "source",
        "a checkpoint is changed by the training that goes on beside it",
        "train/test_checkpoint.py::test_the_state_at_the_call_is_what_is_read_whatever_training_does_meanwhile",
    ),
    # -- embedding ---------------------------------------------------------------------------------
    mutant(
        "embed-rows", "inference/forward.py",
        "self.job.part.result_CF[self.job.rows] =",
        "self.job.part.result_CF[np.sort(self.job.rows)[::-1]] =",
        "cell vectors come in reversed order",
        "inference/test_forward.py::test_the_embedding_is_the_slow_obvious_loop",
    ),
    mutant(
        "attention-padding", "model/gene_model.py",
        "(batch.segment_T == place_C1).to(", "(batch.segment_T <= place_C1).to(",
        "a cell's components hold those of the cells before it",
        "model/test_gene_model.py::test_sums_within_cells_are_on_a_gpu_what_they_are_on_a_host",
    ),
    # -- integration -------------------------------------------------------------------------------
    mutant(
        "kl-weight", "integration/head.py",
        '"kl": self.settings.kl_weight * ramp',
        '"kl": 0.0 * ramp',
        "nothing pulls the latent to the prior",
        "integration/test_integration.py::test_the_weight_of_the_divergence_pulls_the_latent_to_the_prior",
    ),
    mutant(
        "thinned-target", "integration/head.py",
        "torch.where(read_N, batch.full_count_N, 0.0)",
        "torch.where(read_N, batch.shown_N, 0.0)",
        "the decoder is scored on the thinned view instead of the full counts",
        "integration/test_integration.py::test_the_whole_counts_are_explained_however_few_are_shown",
    ),
    mutant(
        "label-loss", "integration/head.py",
        'weights["label"] = self.settings.label_weight',
        'weights["label"] = 0.0',
        "labels are not learnt",
        "integration/test_integration.py::test_labels_are_learnt_from_the_vector_of_the_same_cell",
    ),
    mutant(
        "vectors-reversed", "model/count_encoder.py",
        "self.vectors_NF[batch.cell_C[: batch.n_cells]]",
        "self.vectors_NF[batch.cell_C[: batch.n_cells].flip(0)]",
        "cells are trained and encoded with the vectors of others",
        "integration/test_integration.py::test_labels_are_learnt_from_the_vector_of_the_same_cell",
    ),
    mutant(
        "vector-dropout", "model/count_encoder.py",
        ">= self.feature_dropout",
        ">= 0.0",
        "cell vectors are never hidden",
        "integration/test_integration.py::test_vectors_are_hidden_from_the_share_of_cells_that_is_asked_for",
    ),
    mutant(
        "decoder-batch", "integration/head.py",
        "self.log_share(z_CD, batch.batch_C[:n_cells])",
        "self.log_share(z_CD, torch.full_like(batch.batch_C[:n_cells], -1))",
        "the decoder is not told the batch, so the latent must carry it",
        "integration/test_integration.py::test_the_decoder_is_told_the_batch_in_training",
    ),
    mutant(
        "tilt", "integration/shared_clusters.py",
        "power_C = (self.theta * evidence_C[block])[:, None]",
        "power_C = (0.0 * evidence_C[block])[:, None]",
        "clusters are not mixed over the batches",
        "integration/test_shared_clusters.py::test_the_tilt_mixes_the_batches_in_the_clusters",
    ),
    mutant(
        "offset-evidence", "integration/shared_clusters.py",
        "(member_CK[own] * evidence_C[own, None]).T @ z_CD[own]", "member_CK[own].T @ z_CD[own]",
        "private populations move the offsets",
        "integration/test_shared_clusters.py::test_cells_without_evidence_move_no_offset",
    ),
    mutant(
        "evidence-floor", "integration/shared_clusters.py",
        "np.clip((raw_C - self.floor) / (1 - self.floor), 0, 1)", "raw_C",
        "weak evidence counts",
        "integration/test_shared_clusters.py::test_evidence_begins_at_the_floor",
    ),
    # -- imputation --------------------------------------------------------------------------------
    mutant(
        "average-off", "train/loop.py",
        "torch._foreach_lerp_(self._means_P, learning, 1.0 - decay)",
        "torch._foreach_lerp_(self._means_P, learning, 1.0)",
        "the last weights are used instead of their running mean",
        "imputation/test_imputation.py::test_the_weights_that_are_used_are_a_running_mean",
    ),
    mutant(
        "copying", "imputation/network.py",
        "torch.where(read_N, batch.full_count_N - batch.shown_N, 0.0)",
        "torch.where(read_N, batch.shown_N, 0.0)",
        "the decoder is scored on what it was shown",
        "imputation/test_imputation.py::test_training_predicts_the_molecules_that_were_not_shown",
    ),
    mutant(
        "last-check", "train/loop.py",
        "        if improved:\n            self.release()",
        "        if True:\n            self.release()",
        "the last look is kept and not the best",
        "imputation/test_imputation.py::test_the_best_check_is_kept_and_patience_counts_from_it",
    ),
    mutant(
        "gradient-stopped", "model/count_encoder.py",
        "return self.projection(encoded.cell_CD[: batch.n_cells]).float()",
        "return self.projection(encoded.cell_CD[: batch.n_cells]).float().detach()",
        "the loss of a head does not reach the backbone",
        "finetuning/test_backbones.py::test_the_loss_reaches_what_learns",
    ),
    mutant(
        "all-molecules-as-tokens", "batches/loader.py",
        "begin_C, end_C, gene_N, count_N, library = shown_cells(",
        "_, _, _, _, library = shown_cells(",
        "the transformer is shown the molecules that are to be predicted",
        "batches/test_views.py::test_tokens_are_of_what_is_shown_and_counts_of_what_is_there",
    ),
    mutant(
        "same-molecules-aside", "batches/views.py",
        "_key(self.seed, _ASIDE, 0)", "_key(self.seed, _ASIDE, epoch)",
        "molecules that are set aside are shown in the next pass",
        "batches/test_views.py::test_a_cell_is_shared_out_alike_in_any_company",
    ),
    mutant(
        "same-view", "batches/views.py",
        "_key(self.seed, _THIN, epoch)", "_key(self.seed, _THIN, 0)",
        "every pass shows the same molecules",
        "batches/test_views.py::test_a_cell_is_shared_out_alike_in_any_company",
    ),
    mutant(
        "means-forgotten", "train/loop.py",
        'torch._foreach_copy_(self._means_P, [m.to(self.fabric.device) for m in state["means"]])',
        "pass",
        "a restart forgets the running mean of the weights",
        "command/test_finetuning.py::test_a_run_that_was_cut_off_goes_on_and_another_is_refused",
    ),
    mutant(
        "same-draws", "imputation/writing.py",
        "np.random.default_rng((wanted.seed, block.start))", "np.random.default_rng(wanted.seed)",
        "every block of cells gets the same posterior draws",
        "imputation/test_impute.py::test_blocks_of_equal_cells_get_draws_of_their_own",
    ),
    mutant(
        "impute-decoder-unjudged", "imputation/starting.py",
        "enough = average - told > _TOLD * max(average - by_neighbours, 0.0)", "enough = True",
        "a training starts as the decoder of a model that does not know the cells",
        "imputation/test_impute_again.py"
        "::test_training_starts_as_a_decoder_that_knows_the_cells",
    ),
    mutant(
        "impute-start-without-genes", "imputation/starting.py",
        "    head.gene_GD[known_G] = gene_VF[place_G[known_G]].to(head.gene_GD)\n", "",
        "the gene vectors of a model's decoder are no start",
        "imputation/test_impute_again.py"
        "::test_training_starts_as_a_decoder_that_knows_the_cells",
    ),
    mutant(
        "pretrained-factors", "imputation/starting.py",
        "head.bias_G.add_(((found_G + prior) / (expected_G + prior)).log().float())", "pass",
        "a pre-trained decoder expects of other chemistries what it expected of its own",
        "imputation/test_impute_pretrained.py"
        "::test_factors_are_found_where_there_are_counts_and_stay_where_there_are_none",
    ),
    mutant(
        "pretrained-aside", "imputation/pretrained.py",
        "self._vectors(seen_SG))", "self._vectors(sample_SG))",
        "the vectors have seen the molecules that settle the dispersion",
        "imputation/test_impute_pretrained.py"
        "::test_many_cells_are_settled_by_some_from_everywhere",
    ),
    mutant(
        "head-manifest", "finetuning/beneath.py",
        "return own if bundle is None else TrainingManifest.after(bundle.training, own)",
        "return own if bundle is None else bundle.training",
        "a head does not tell the cells that it was trained on itself",
        "embedding/test_contamination.py"
        "::test_a_head_on_a_bundle_tells_its_own_cells_and_those_of_the_bundle",
    ),
    mutant(
        "posterior-evidence", "imputation/posterior.py",
        "prior_shape_G + np.where(exposure_CG > 0, count_CG, 0.0)",
        "prior_shape_G + 0.0 * count_CG",
        "a cell's own counts say nothing about it",
        "imputation/test_posterior.py::test_posterior_matches_grid_integration",
    ),
    mutant(
        "calibration-exposure", "imputation/posterior.py",
        "held_CG[cells], exposure_ratio * mean_CG, shape_CG", "held_CG[cells], mean_CG, shape_CG",
        "molecules set aside are judged as if they were as many as those shown",
        "imputation/test_posterior.py::test_calibration_recovers_dispersion_and_coverage",
    ),
    mutant(
        "other-batch", "imputation/model.py",
        "rate_CG *= own_CG / np.maximum(wanted_CG, 1e-30)", "pass",
        "batch= does nothing to a posterior",
        "imputation/test_imputation_model.py::test_an_unknown_batch_is_the_mean_of_all",
        "imputation/test_impute.py::test_another_batch_moves_the_prior_and_keeps_the_evidence",
    ),
    # -- counts, neighbours, labels, scores --------------------------------------------------------
    mutant(
        "split-molecules", "expression/thinning.py",
        "for part_N in (kept_N, value_N - kept_N):", "for part_N in (kept_N, value_N):",
        "molecules set aside are shown, too",
        "expression/test_thinning.py::test_split_keeps_every_molecule",
    ),
    mutant(
        "own-neighbour", "expression/neighbours.py",
        "own_CK = index_CK == itself_C[:, None]", "own_CK = np.zeros(index_CK.shape, bool)",
        "a cell is its own neighbour",
        "expression/test_neighbours.py::test_a_cell_is_never_its_own_neighbour_among_duplicates",
    ),
    mutant(
        "one-sided-pairs", "expression/neighbours.py",
        "np.intersect1d(there_N, back_N, assume_unique=True)", "np.sort(there_N)",
        "pairs of neighbours are not mutual",
        "expression/test_neighbours.py::test_mutual_pairs_equal_the_slow_version",
    ),
    mutant(
        "perturb-library-kept", "perturbation/variants.py",
        "    if not held:\n        change_R", "    if False:\n        change_R",
        "what a deletion leaves is still a share of the old library",
        "perturbation/test_variants.py::test_deletion_is_the_cell_without_the_gene_counted_again",
    ),
    mutant(
        "perturb-held-moves", "perturbation/variants.py",
        "rank_T=rank_R[order_R] if held else _ranks(place_R, tokens.style)",
        "rank_T=_ranks(place_R, tokens.style)",
        "the position-preserving knock-out shifts positions",
        "perturbation/test_variants.py::test_what_is_held_keeps_rank_value_and_library_to_the_bit",
    ),
    mutant(
        "perturb-normal-tails", "perturbation/statistics.py",
        "freedom, _, scale = stats.t.fit(np.concatenate(pool), floc=0)",
        "freedom, scale = 1e6, float(np.std(np.concatenate(pool)))",
        "heavy tails of shifts are taken for effects",
        "perturbation/test_perturb.py"
        "::test_matched_test_is_uniform_whatever_the_tails_and_finds_what_is_beyond",
    ),
    mutant(
        "perturb-cells-held-out", "perturbation/states.py",
        "cell_CD[~out & (is_goal_C == state)]", "cell_CD[is_goal_C == state]",
        "states are told apart on the cells that made their means",
        "perturbation/test_perturb.py::test_cells_do_not_vote_for_the_mean_that_they_are_part_of",
    ),
    mutant(
        "jacobian-of-dummies", "networks/jacobian.py",
        "encode_opening(self.model, batch)[: batch.n_cells]", "encode_opening(self.model, batch)",
        "places without a cell add derivatives of the tokens that they read",
        "networks/test_networks.py::test_the_jacobian_is_what_one_count_more_does",
    ),
    mutant(
        "jacobian-library-held", "networks/jacobian.py",
        "    return own_F + library_C[batch.segment_T[at_F]]", "    return own_F",
        "a count more changes its own value and no library",
        "networks/test_networks.py::test_the_jacobian_is_what_one_count_more_does",
    ),
    mutant(
        "attention-of-chosen-alone", "networks/attention_sums.py",
        "score_Hqt.softmax(-1).index_select(2, key)", "score_Hqt.index_select(2, key).softmax(-1)",
        "attention adds up to 1 over the chosen genes instead of all of the cell",
        "networks/test_networks.py::test_attention_is_that_of_dense_matrices",
    ),
    mutant(
        "matched-pairs-one-sided", "metrics/networks.py",
        "for side_EN in (louder_EN > 0, louder_EN < 0):", "for side_EN in (louder_EN < 0,):",
        "pairs that edges are compared with are all quieter",
        "metrics/test_network_scores.py"
        "::test_matched_pairs_are_none_of_the_edges_and_lie_on_both_sides",
    ),
    mutant(
        "perturb-own-ranks", "perturbation/passes.py",
        "self._scale_V = rank_scale(bundle.medians_V, bundle.tokens.style)",
        "self._scale_V = inverse_medians(bundle.medians_V)",
        "cells of a published style are perturbed in an order of ours",
        "importers/test_attention_parity.py"
        "::test_genes_move_as_in_the_published_sequence_without_one",
    ),
    mutant(
        "perturb-closing-token", "batches/tokens.py",
        'return EOS + 1 if self.style == "geneformer_v2" else N_SPECIAL', "return N_SPECIAL",
        "the token that closes an imported cell is deleted as a gene",
        "importers/test_perturbing_imported.py::test_special_tokens_are_no_genes",
    ),
    mutant(
        "perturb-no-opening", "perturbation/passes.py",
        "+ 1 - int(self.bundle.tokens.opens)", "",
        "the first gene of a Geneformer V1 counts as absent, and the others as one before",
        "importers/test_perturbing_imported.py"
        "::test_shifts_are_those_of_the_published_procedure",
    ),
    mutant(
        "perturb-last-layer", "model/opening.py",
        "read = model.blocks[: model.cell_stop]", "read = model.blocks",
        "an imported model is read one layer above the published one",
        "importers/test_perturbing_imported.py"
        "::test_shifts_are_those_of_the_published_procedure",
    ),
    mutant(
        "trajectory-donor-seen", "trajectories/holdouts.py",
        "train = np.flatnonzero(known_C & ~out_C)", "train = np.flatnonzero(known_C)",
        "cells are placed by their own donor",
        "trajectories/test_trajectory.py"
        "::test_what_is_learnt_from_is_never_what_is_asked_for",
    ),
    mutant(
        "trajectory-time-seen", "trajectories/populations.py",
        "kept = np.flatnonzero((self.times.code_C >= 0) & (self.times.code_C != time))",
        "kept = np.flatnonzero(self.times.code_C >= 0)",
        "a population that is predicted was trained on",
        "trajectories/test_trajectory.py::test_no_cell_of_the_time_held_out_is_used",
    ),
    mutant(
        "ordinal-unweighted", "trajectories/ordinal.py",
        "weight_C = 1.0 / (len(value_T) * n_T[code_C])",
        "weight_C = np.full(code_C.size, 1.0 / code_C.size)",
        "the time with most cells draws all others to it",
        "trajectories/test_ordinal.py::test_a_rare_time_weighs_as_much_as_a_common_one",
    ),
    mutant(
        "respond-one-control-group", "response/scoring.py",
        "judges = Judge(screen, learned, judge, noise_UG, rng)",
        "judges = Judge(screen, learned, learned, noise_UG, rng)",
        "chance of the controls is learned and then found again",
        "response/test_respond.py::test_a_null_screen_has_no_scores",
    ),
    mutant(
        "respond-silence-pays", "metrics/response.py",
        "most = max(n_real, n_called)", "most = n_called",
        "calling a single sure gene is all that fidelity asks",
        "metrics/test_response_metrics.py::test_a_perfect_prediction_and_its_opposite",
    ),
    mutant(
        "respond-batches-shuffled", "response/null_test.py",
        "to[at] = rng.permutation(at)", "to[at] = rng.choice(len(batch_C), len(at))",
        "batches are taken for effects of the perturbation",
        "response/test_respond.py::test_batches_are_no_effect",
    ),
    mutant(
        "votes-unweighted", "annotation/annotate.py",
        "weight_CK = np.exp(-distance_CK / width_C1)", "weight_CK = np.ones_like(distance_CK)",
        "far neighbours vote as near ones do",
        "annotation/test_annotate.py::test_votes_equal_the_slow_and_obvious_version",
    ),
    mutant(
        "confidence-raw", "annotation/annotate.py",
        "np.minimum(self.regression.predict(share_C), most)", "np.minimum(share_C, most)",
        "confidence is the share of votes, not calibrated",
        "annotation/test_annotate.py::test_an_only_vote_is_no_certainty_where_labels_are_chance",
    ),
    mutant(
        "trained-on-all", "train/recipe.py",
        "TrainingManifest.of(corpus, plan.train_cells)",
        "TrainingManifest.of(corpus, np.arange(len(corpus)))",
        "cells that were held out count as trained on",
        "train/test_start.py::test_the_cells_trained_on_are_known_and_those_held_out_are_not",
    ),
    mutant(
        "start-forgotten", "train/recipe.py",
        "before = start.training if start is not None else TrainingManifest()",
        "before = TrainingManifest()",
        "what the start was trained on is forgotten",
        "train/test_start.py::test_what_the_start_was_trained_on_is_handed_down",
    ),
    mutant(
        "poor-parts", "cells/kernels.py",
        "if genes_P[p] >= _LEAST_GENES else", "if genes_P[p] >= 1 else",
        "cells are told apart by a gene or two",
        "corpus/test_corpus.py::test_fingerprints_equal_the_slow_oracle",
    ),
    mutant(
        "one-size", "embedding/contamination.py",
        "_FINER = (-1, 0, 1)", "_FINER = (0,)",
        "cells that have lost a few genes are looked up by parts of another size",
        "embedding/test_contamination.py::test_parts_of_half_the_size_are_looked_up_too",
    ),
    mutant(
        "grown-vocabulary", "embedding/contamination.py",
        "counts_CV.data, size, finer", "counts_CV.data, counts_CV.shape[1], finer",
        "genes that came later count for cells trained on before",
        "embedding/test_contamination.py::"
        "test_a_vocabulary_that_has_grown_knows_the_cells_of_before",
    ),
    mutant(
        "label-temperature-off", "annotation/label_head.py",
        "bounds=(-3.0, 3.0)", "bounds=(-1e-9, 1e-9)",
        "the probabilities of labels are not calibrated",
        "annotation/test_label_head.py::test_temperature_makes_overconfident_scores_true",
    ),
    mutant(
        "label-folds-of-cells", "annotation/label_head.py",
        "return fold_B[batch_R], True", "return rng.permutation(fold_B[batch_R]), True",
        "cells are held out where whole donors should be",
        "annotation/test_label_head.py::test_whole_donors_are_held_out",
    ),
    mutant(
        "label-shift-ungated", "annotation/novelty.py",
        "if len(shared) < SHIFT_TYPES:", "if len(shared) < 1:",
        "two populations are evidence of a shift of the whole query",
        "annotation/test_label_head.py::test_another_condition_is_taken_off_where_types_agree",
    ),
    mutant(
        "label-own-shift-of-any-length", "annotation/novelty.py",
        "own_LG[length_L > OWN_MOST * usual] = 0.0", "own_LG[length_L > np.inf] = 0.0",
        "a new type is moved onto one that the query lacks",
        "annotation/test_label_head.py::"
        "test_a_type_that_changed_more_than_the_others_has_a_shift_of_its_own",
    ),
    mutant(
        "label-limit-without-left-out", "annotation/novelty.py",
        "limit = max(limit, float(score_N[order[int(np.argmax(gain_N))]]))", "limit = limit",
        "what is unknown is set on known cells alone",
        "annotation/test_label_head.py::test_the_limit_is_set_on_types_left_out_but_keeps_known_cells",
    ),
    mutant(
        "across-batches", "integration/linear_start.py",
        "out_SJ[rows] -= out_SJ[rows].mean(0)",
        "out_SJ[rows] -= 0 * out_SJ[rows].mean(0)",
        "the components that few cells start at are those of the batches",
        "integration/test_linear_start.py::test_components_are_of_the_cells_of_a_batch_and_of_one_size",
    ),
    mutant(
        "share-by-nothing", "integration/linear_start.py",
        "return _SHARES[int(np.argmax(scores))]",
        "return _SHARES[2]",
        "vectors of a model take part whether or not it knows the cells",
        "integration/test_linear_start.py::test_vectors_take_the_share_that_tells_unseen_molecules",
    ),
    mutant(
        "many-passes", "integration/training.py",
        "self.steps = min(self.steps, math.ceil(most * n_cells / at_once))",
        "pass",
        "few cells are seen a thousand times",
        "integration/test_linear_start.py::test_the_latent_starts_at_the_components_and_takes_few_passes",
    ),
    mutant(
        "start-of-noise", "integration/head.py",
        "self.to_mean.weight.copy_(torch.eye(latent, read).roll(width, 1))",
        "pass",
        "the latent of few cells does not start at their components",
        "integration/test_linear_start.py::test_the_latent_starts_at_the_components_and_takes_few_passes",
    ),
    mutant(
        "same-draw", "evaluation/sizes.py",
        "default_rng((size, draw))", "default_rng(size)",
        "all draws of a size are of the same cells",
        "evaluation/test_sizes.py::test_every_method_sees_the_same_cells_of_every_draw",
    ),
    mutant(
        "corpus-mean", "evaluation/baselines.py",
        "average_SK[species_C], \"f4\"", "0 * average_SK[species_C], \"f4\"",
        "cells are projected on a corpus without taking its mean off",
        "evaluation/test_baselines.py::test_a_projection_on_a_corpus_is_its_pca",
    ),
    mutant(
        "second-rows", "inference/gene_counts.py",
        "column_N = np.flatnonzero(at_G >= 0)",
        "column_N = np.array([g for g, w in enumerate(at_G) if w >= 0 and w not in at_G[:g]])",
        "of a gene that stands in several columns the first alone counts",
        "imputation/test_impute_again.py::test_rows_that_were_made_unique_lose_no_counts",
    ),
    mutant(
        "hidden-labels", "evaluation/evaluate.py",
        "label.mask(hidden_C, None)", "label.where(hidden_C, None)",
        "the complement of the labels is hidden",
        "evaluation/test_evaluate.py::test_the_share_of_hidden_labels_is_the_one_asked_for",
    ),
    mutant(
        "judged-everywhere", "metrics/light.py",
        "judged_C = _in_other_batches(label_C, batch_C)", "judged_C = np.ones(len(label_C), bool)",
        "types that one batch alone has count as errors across batches",
        "metrics/test_light_metrics.py::"
        "test_knn_accuracy_across_batches_ignores_own_batch_and_unshared_labels",
    ),
    mutant(
        "total-weight", "metrics/scib.py",
        "_BIO_WEIGHT = 0.6", "_BIO_WEIGHT = 0.5",
        "totals are not those of scIB",
        "metrics/test_metrics.py::test_totals_are_weighted_as_in_the_scib_study",
    ),
    # -- published models ------------------------------------------------------------------------
    mutant(
        "published_depth", "batches/published.py",
        "return count_N / total_N * 10_000.0 / median_N", "return count_N / median_N",
        "Geneformer's ranks differ where two genes tie to the last bit",
        "batches/test_published.py::test_the_whole_depth_of_a_cell_decides_ties_to_the_last_bit",
    ),
    mutant(
        "published_position", "batches/published.py",
        'place_N[kept_N] + (style == "geneformer_v2")', "place_N[kept_N]",
        "genes of Geneformer V2 stand one position too early",
        "batches/test_published.py",
    ),
    mutant(
        "published_mean", "model/gene_model.py",
        "batch.gene_T >= (EOS + 1 if closed else N_SPECIAL)", "batch.gene_T >= N_SPECIAL",
        "the closing token is in the mean over a cell's genes",
        "importers/test_geneformer_parity.py::"
        "test_embeddings_are_means_of_genes_in_the_second_to_last_layer",
    ),
    mutant(
        "knowledge_shuffled", "genes/knowledge.py",
        "table[np.random.default_rng(seed).permutation(known)]", "table[known]",
        "the shuffled control is the table itself",
        "genes/test_knowledge.py::test_shuffling_keeps_the_vectors_and_who_is_known",
    ),
    mutant(
        "new_genes_orthologs", "train/new_genes.py",
        "self.means_VV[np.flatnonzero(has_means)] @ before", "before[has_means]",
        "the copies of a gene begin at random",
        "train/test_new_genes.py::test_copies_of_a_gene_begin_as_that_gene",
    ),
    mutant(
        "published_homologs", "importers/genecompass.py",
        "torch.stack([own_V, homolog_Q[own_V]])", "torch.stack([own_V, own_V])",
        "mouse cells read the knowledge of human genes",
        "importers/test_genecompass_parity.py",
    ),
    mutant(
        "published_tuning", "model/tuning.py",
        "if cells_only and model.cell_stop is not None:", "if False:",
        "a block that no loss reaches is the one that learns",
        "importers/test_imported_models.py::"
        "test_a_head_reaches_the_blocks_that_cells_are_read_from",
    ),
    mutant(
        "pickle_names", "importers/pickles.py",
        "    if meaning is None:\n", "    if meaning is None and not name:\n",
        "an unknown name in a pickle is not refused by its name",
        "importers/test_pickles.py",
    ),
    mutant(
        "adapter_scale", "importers/checkpoint.py",
        "tensors[name] = old + scale * change", "tensors[name] = old + change",
        "a LoRA adapter is added without its weight",
        "importers/test_importing.py::test_a_lora_adapter_is_added_to_the_model_that_it_names",
    ),
    mutant(
        "left_over", "importers/importing.py",
        "    take.finish()\n", "",
        "tensors that a model has no place for are passed over",
        "importers/test_importing.py",
    ),
    mutant(
        "gene_sums", "gene_tasks/passes.py",
        "place_T = place_T + group_T * self.n_rows", "place_T = place_T + 0 * group_T",
        "vectors of the cells of one label are those of all",
        "gene_tasks/test_vectors.py::test_labels_part_the_cells_and_those_without_count_in_the_whole",
    ),
    mutant(
        "gene_leak", "gene_tasks/training.py",
        "code_V = task.codes(len(bundle.vocabulary), held_G)",
        "code_V = task.codes(len(bundle.vocabulary))",
        "a fold's labels are learnt by the model that is to predict them",
        "gene_tasks/test_training.py::test_predictions_of_a_fold_know_nothing_of_its_labels",
    ),
    mutant(
        "gene_families", "gene_tasks/families.py",
        "folds.split(code_G, code_G, group_G)", "folds.split(code_G, code_G, range(len(code_G)))",
        "paralogues are learnt from and asked for",
        "gene_tasks/test_families.py::test_no_family_is_in_two_folds",
    ),
    mutant(
        "attributed_places", "attribution/integrated_gradients.py",
        "scored(at_TD)[: batch.n_cells].sum()", "scored(at_TD).sum()",
        "places without a cell answer for tokens of the first ones",
        "attribution/test_attribute.py",
    ),
    mutant(
        "attributed_components", "attribution/integrated_gradients.py",
        "worth_T = worth_T + (part_TD * slope_TD[opening_T]).sum(-1)", "worth_T = worth_T + 0.0",
        "what genes add to the opening token is nobody's",
        "attribution/test_attribute.py",
    ),
    mutant(
        "gene_score_ties", "metrics/gene_labels.py",
        "(no_BU * (yes_so_far - yes_BU / 2)).sum(1)", "(no_BU * yes_so_far).sum(1)",
        "genes with the same score count as told apart",
        "metrics/test_gene_label_scores.py",
    ),
)  # fmt: skip


def run_tests(folder: Path, tests: list[str], *, first_only: bool = True) -> tuple[int | None, str]:
    """Run tests in a copy; returns pytest's exit code (None: too long) and what it said."""
    environment = {
        "GENEMODEL_TEST_DATA": str(REPOSITORY.parent / "shared"), "OMP_NUM_THREADS": "1",
        **os.environ, "PYTHONPATH": str(folder),
        # Plugins take longer to load than most of these tests; none is needed.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            words + ["-x"] * first_only, cwd=folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=LONGEST_S if first_only else None,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout


def judge(folder: Path, one: Mutant) -> tuple[str, str]:
    """Apply one mutant to the copy, run its tests and undo it; returns the outcome and a reason."""
    path = folder / "genemodel" / one.file
    original = path.read_text("utf-8")
    mutated = one.applied_to(original)
    if mutated is None:
        return "does not apply", f"the snippet is there {original.count(one.old)} times"
    path.write_text(mutated, "utf-8")
    try:
        code, said = run_tests(folder, list(one.tests))
    finally:
        path.write_text(original, "utf-8")
    if code == PASSED:
        return "survived", one.breaks
    if code in (FAILED, None):
        return "killed", "" if code else "it did not come to an end"
    return "does not apply", f"pytest ended with {code}: {said.strip().splitlines()[-1:]}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants")
    parser.add_argument("--no-baseline", action="store_true", help="believe that the tests pass")
    options = parser.parse_args(words)
    if unknown := set(options.only or ()) - {one.name for one in MUTANTS}:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}; see --list")
    chosen = [one for one in MUTANTS if not options.only or one.name in options.only]
    if options.list:
        for one in chosen:
            print(f"{one.name:26} {one.file:32} {one.breaks}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutate-") as name:
        folder = Path(name)
        for part in COPIED:
            source = REPOSITORY / part
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / part)
        if not options.no_baseline:
            tests = sorted({test for one in chosen for test in one.tests})
            code, said = run_tests(folder, tests, first_only=False)
            if code != PASSED:
                print(said)
                print("The tests fail without any mutant: mend that first.")
                return 1
        outcomes: Counter[str] = Counter()
        for one in chosen:
            begin = time.monotonic()
            outcome, why = judge(folder, one)
            outcomes[outcome] += 1
            took = f"{time.monotonic() - begin:4.0f} s"
            print(f"{outcome:14} {took}  {one.name:26} {why}", flush=True)
    print(", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common()))
    return int(set(outcomes) != {"killed"})


if __name__ == "__main__":
    sys.exit(main())
