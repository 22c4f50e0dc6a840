"""For each form the programs of the zoo that it takes, and near misses that are left for a rule that is named.

Its file is `fx_passes/forms/NAME.py`, its goldens are in `tests/forms/goldens/test_NAME*.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    programs: tuple[str, ...]
    near_misses: tuple[str, ...]


def row(programs: str, near_misses: str) -> Row:
    return Row(tuple(programs.split()), tuple(near_misses.split()))


TABLE = {
    "summed_outputs": row(
        """
        summed_stacked summed_listed summed_in_loop summed_put_anew summed_one_buffer summed_buffer_behind_tokens
        summed_buffer_of_choices choices_weighted_of_hit
        """,
        """
        summed_left_out summed_twice summed_scaled summed_read summed_repeated_ids summed_before_written
        summed_onto_its_own summed_guard_of_another summed_shared_places summed_in_part summed_mean_weight
        """,
    ),
    "hit_loop": row(
        """
        mixtral_451 mixtral_457 qwen2_moe_457 qwen3_moe_451 stacked_sentinel stacked_unnormalized stacked_top_1
        stacked_top_all stacked_no_sentinel stacked_relu2 gpt_oss_5 granite_5 hit_flatten hit_unpacked
        hit_column hit_where unique_ids hit_enumerated hit_flat_weights hit_swiglu hit_swiglu_fused hit_geglu_bias
        hit_gelu_bias hit_gelu_tanh hit_relu_squared hit_three_layers hit_layer_norm_first hit_rms_norm_after
        hit_lora hit_residual hit_clamped hit_one_linear hit_one_gate hit_uneven_halves hit_sigmoid_glu
        views_hit_halves hit_shared_norm stacked_of_one starts_as_copy
        """,
        """
        hit_without_first hit_twice hit_busy_experts hit_hits_of_other_ids hit_previous_rows
        hit_enumerated_by_place hit_enumerated_scaled_by_place hit_enumerated_last_place hit_stack_mean_over_rows
        hit_stack_rows_reversed hit_stack_beside_other_rows
        """,
    ),
    "range_loop": row(
        """
        mixtral_436 mixtral_445 qwen2_moe_445 olmoe_445 deepseek_v3_457 deepseek_v3_enumerate deepseek_reference
        deepseek_local stacked_range phimoe_445_eval phimoe_445_train jamba_445 any_guard any_guard_continue
        otherwise_touched_in_training otherwise_touched_on_demand
        sum_guard len_guard plus_equals zip_masks hit_tolist weight_on_input unweighted fp32_accumulator
        closure_over_experts sigmoid_top expert_by_name expert_by_item dropped_one_hot dropped_one_hot_padding
        dropped_choice listed_all_at_once listed_all_nonzero listed_kept_dim listed_unbound any_mask_rows any_mask_where
        any_mask_argmax any_mask_nonzero any_mask_compared dense_gate_column multi_hot
        own_masked_sum own_mask_rows own_mask_factor own_picked own_numbers own_gathered own_argmax own_where
        sequence_mask sequence_rows sequence_where
        sequence_flat_output flat_to_tokens slot_numbers_by_mask slot_numbers_by_position slot_numbers_in_order
        range_swiglu range_swiglu_fused range_geglu_bias range_gelu_bias
        range_gelu_tanh range_relu_squared range_three_layers range_layer_norm_first range_rms_norm_after
        range_lora range_residual range_clamped range_one_linear range_one_gate range_uneven_halves
        range_sigmoid_glu range_narrow range_clamped_by_tensors range_dropout_eval parameters_taken
        parameters_biases parameters_addmm parameters_einsum views_halves views_halves_in_one_index views_chunks
        views_every_other views_halves_of_the_stack views_three_to_four views_thirds views_halves_of_biases
        views_unbound views_enumerated views_segments views_experts_last views_halves_of_modules
        temporaries_weighted temporaries_cast temporaries_activated temporaries_gated temporaries_residual
        segments_of_slots segments_of_slots_inference segments_of_slots_index_add segments_of_slots_searched
        segments_of_slots_starts
        hit_identity_experts hit_item_more_classes
        merged_loop merged_normalised merged_stacked merged_of_hit
        picked_index_select picked_index_select_wide picked_gather picked_index_put picked_transposed picked_clipped
        loads_after loads_first loads_bias starts_as_shared starts_as_input starts_as_zeros_read_later
        starts_as_product_read_later starts_cast_each_time starts_cast_each_time_of_hit
        hit_list hit_list_on_host hit_list_set_sorted hit_list_set hit_list_items hit_list_stacked
        hit_enumerated_numbers
        loads_counted_inside loads_counted_of_hit loads_assigned_inside loads_summed_inside
        sequence_top_1_added sequence_top_1_flattened
        gate_columns_positions gate_columns_guarded gate_columns_closed gate_columns_threshold gate_columns_one_hot
        gate_columns_sequences gate_columns_flat
        """,
        """
        picked_columns picked_diagonally picked_put_without_adding picked_compared_with_others
        otherwise_in_training otherwise_on_demand otherwise_set_in_forward
        range_guard_of_other_ids range_ids_made_equal any_mask_clamped_ids sequence_transposed_mask
        own_repeated_ids own_of_another_expert own_changed_ids own_one_weight
        parameters_next_bias temporaries_input_written slot_numbers_rows_of_others slot_numbers_weights_by_slot
        slot_numbers_fewer_counted
        sequence_top_1_of_the_sequence sequence_top_1_twice gate_columns_next
        gate_columns_repeated_ids gate_columns_written
        range_partly_in_place range_zeros_written range_zeros_scattered
        merged_dropped merged_other_scales merged_of_the_next merged_by_slot
        hit_list_without_first hit_list_discarded hit_list_of_one_token hit_list_left_early hit_list_last_number
        hit_enumerated_without_first
        merged_of_the_next_hit merged_of_the_sum_of_hits merged_dropped_of_hit loads_in_half loads_in_python
        dropped_choice_counted dropped_choice_and_next dropped_choices_in_order
        """,
    ),
    "slot_loop": row(
        """
        slots_then_experts slot_columns experts_then_slots sequence_slots sequence_flat_columns
        sequence_flat_column_of_zeros hit_list_by_slot hit_list_by_slot_once
        loads_summed_by_slot
        """,
        """
        slots_weight_of_another slots_guard_of_another slots_pair_left_out slots_first_twice
        loads_of_another_under_guard loads_of_all_slots_under_guard loads_one_under_guard
        sequence_flat_weights_of_another sequence_flat_column_written sequence_flat_column_twice
        sequence_flat_column_transposed sequence_flat_weights_transposed
        """,
    ),
    "assignment": row(
        """
        switch_assignment switch_one_hot switch_dropped switch_lists switch_lists_eval switch_lists_unscaled
        switch_lists_copied dropped_sequences dropped_listed
        choices_assigned choices_skipped choices_copied choices_copied_anew choices_put_anew
        choices_weighted_inside sequence_flat_column_assigned
        sequence_top_1_assigned sequence_top_1_one_hot
        sequence_top_1_kept_dim sequence_top_1_own_probability
        """,
        """
        assigned_any_mask assigned_then_added assigned_to_view assigned_without_one copied_by_token
        switch_lists_assigned_twice switch_lists_outputs_returned list_by_place list_in_part list_extended
        choices_shared choices_other_choice choices_written_before choices_read_inside choices_left_out
        choices_weight_of_another choices_weight_written choices_weight_of_all_rows choices_weight_used_again
        range_sequences_next_expert
        sequence_top_1_two_choices sequence_top_1_swapped sequence_top_1_next_probability sequence_top_1_written
        """,
    ),
    "flat_pairs": row(
        """
        deepseek_v2_train flat_weighted_inside flat_weighted_in_place flat_copied flat_paired
        flat_paired_weighted flat_copies_expanded flat_copies_repeated
        """,
        "flat_tiled flat_mean flat_rows_written flat_ids_written flat_copies_tiled flat_copies_written",
    ),
    "sorted_slots": row(
        """
        sorted_slots_under_autocast sorted_slots sorted_slots_argsort sorted_slots_norm
        sorted_slots_expert_parallel
        """,
        """
        slots_other_offsets slots_sorted_twice slots_clamped_first slots_sentinels_add_up
        """,
    ),
    "sorted_segments": row(
        """
        deepseek_v2_infer granite_45x segments_split segments_compared segments_sliced segments_skipped segments_array
        segments_written segments_for_loop merged_segments picked_in_bins gate_lists
        gate_lists_noisy gate_lists_softmax_first
        gate_lists_log_space gate_lists_plain gate_lists_closed
        filtered_comprehension filtered_compared filtered_appended
        tallies_scatter_added tallies_index_added_later tallies_added_anew tallies_table_added tallies_table_filled
        tallies_one_hot_of_slots tallies_listed_sums tallies_sums_on_the_way tallies_stacked_sums
        """,
        """
        segments_tied segments_with_mixed_rows segments_skip_singles segments_read_last
        filtered_first_part filtered_twice filtered_looped_over filtered_in_dict filtered_of_another
        tallies_of_even_tokens tallies_ones_written tallies_changed_afterwards tallies_added_twice
        tallies_read_while_empty tallies_repeated_in_table tallies_sums_of_first_choice tallies_sums_of_changed_masks
        tallies_stacked_backwards
        picked_bin_of_nobody gate_lists_other_expert gate_lists_other_tokens gate_lists_returned_rows
        """,
    ),
    "segments": row(
        """
        segments_tensors segments_residual segments_projections segments_projections_written
        segments_projections_detached segments_projections_elsewhere segments_projections_read_twice
        """,
        "bounds_tensors_shifted bounds_one_not_written bounds_written_before_use",
    ),
    "gathered_weights": row(
        """
        gathered_einsum gathered_from_the_end gathered_clamped gathered_matmul gathered_norm gathered_batched_mm
        gathered_expert_parallel
        """,
        """
        gathered_other_experts gathered_sum_over_tokens gathered_frozen_down gathered_flat_ids_written
        """,
    ),
    "dense_experts": row(
        """
        gpt_oss_457_dense dense_einsum dense_einsum_transposed dense_masked_softmax dense_llama4
        dense_added_by_number dense_picked_by_number
        dense_sequences_einsum dense_sequences_experts_first dense_sequences_cut
        """,
        """
        dense_all_soft dense_all_threshold dense_all_repeated_ids dense_all_biased_inputs
        dense_all_numbers_written dense_sequences_soft dense_sequences_mean_over_sequence dense_sequences_cut_as_it_lies
        """,
    ),
    "dense_modules": row(
        """
        dense_sum stack_gather dense_modules_filled_late dense_modules_sum dense_modules_in_place
        dense_modules_beside_shared dense_modules_masked dense_modules_einsum dense_modules_product dense_modules_matmul
        dense_modules_gather dense_modules_index dense_modules_norm
        dense_modules_where dense_modules_where_not dense_modules_kept_scores dense_modules_where_top_1
        merged_dense_modules dense_modules_one_hot dense_modules_one_hot_einsum dense_modules_scaled
        dense_modules_normalized
        dense_slots dense_slots_experts_outside dense_slots_where dense_slots_sequences
        dense_slots_masked_inputs dense_modules_masked_inputs
        """,
        """
        dense_modules_normalized_over_tokens
        dense_modules_soft dense_modules_repeated_ids dense_modules_tied dense_modules_weights_written
        dense_slots_pair_left_out dense_slots_pair_twice dense_slots_weight_of_another dense_slots_other_experts
        dense_slots_written
        dense_modules_where_repeated dense_modules_where_left_out dense_modules_where_of_another
        dense_modules_where_otherwise dense_modules_where_unchosen dense_modules_first_features
        dense_masked_by_the_next dense_masked_by_one_slot dense_masked_by_repeated dense_mask_written
        dense_masked_from_the_end dense_weighted_twice dense_weighted_by_one_hot
        """,
    ),
    "fixed_capacity": row(
        "",
        "capacity_gshard capacity_grouped capacity_expert_choice",
    ),
}
