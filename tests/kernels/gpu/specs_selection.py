"""Kernels of selection and of the optimiser, as they are launched at F = 32,768 or 131,072, k = 32 to 512.

Budgets: registers a thread that still let the programs meant to share a multiprocessor do so.
"""

import triton.language as tl

TOPK = "triton_kernels.gpu.select_topk:"
ADAM = "triton_kernels.gpu.adam_rows:"

MAXIMA = {"n_features": "i32:16", "n_groups": "i32:16", "n_tiles": "i32", "scale_ptr": "*fp32"}
GROUPS = {"groups_ptr": "*i32", "n_groups": "i32:16", "k": "i32:16"}
FEATURES = {
    **dict.fromkeys(("groups_ptr", "features_ptr"), "*i32"),
    **dict.fromkeys(("n_features", "k", "first_feature", "z_stride", "features_stride"), "i32:16"),
    "scale_ptr": "*fp32",
}
PAIRS = {
    **dict.fromkeys(("counts_ptr", "columns_ptr", "bound_ptr"), "*i32"),
    **dict.fromkeys(("scale_ptr", "lower_ptr", "score_out_ptr"), "*fp32"),
    **dict.fromkeys(("n_features", "n_groups"), "i32:16"),
    "n_tiles": "i32",
    "ends_ptr": "*i64",
}
HISTOGRAM = {"bound_ptr": "*i32", "counts_ptr": "*i32", "n_keys": "i32:16"}
STATE = {
    **dict.fromkeys(("p_ptr", "g_ptr", "m_ptr", "v_ptr", "scale_ptr"), "*fp32"),
    **dict.fromkeys(("keep", "blend_first", "decay_second", "blend_second", "rate", "root", "eps"), "fp32"),
    "working_ptr": "*i16",
}
ROWS = {**STATE, "width": "i32:16", "group_rows": "i32:16"}
EVERYTHING = {"SCALED": True, "WORKING": True}


def choice(size, bits):
    return {"SIZE": size, "CHUNK": min(size, 2048), "BITS": bits}


def features(dtype, scaled, gather, size, bits, warps):
    signature = {**FEATURES, "z_ptr": dtype, "chosen_z_ptr": dtype}
    constants = {"SCALED": scaled, "GATHER": gather, **choice(size, bits)}
    return (TOPK + "choose_features_kernel", signature, constants, warps, 3, 128)


def group_max(dtype, key, scaled, budget):
    signature = {**MAXIMA, "z_ptr": dtype, "maxima_ptr": key}
    return ("triton_kernels.gpu.group_max:group_max_kernel", signature, {"SCALED": scaled, "TILE": 128}, 4, 3, budget)


def pairs(dtype, key, scaled, per_column, write, budget):
    signature = {**PAIRS, "z_ptr": dtype, "z_out_ptr": dtype, "maxima_ptr": key}
    constants = {"SCALED": scaled, "PER_COLUMN": per_column, "WRITE": write, "TILE": 128}
    return ("triton_kernels.gpu.select_threshold:kept_pairs_kernel", signature, constants, 8 if write else 4, 3, budget)


def histogram(key, low):
    constants = {"LOW": low, "BINS": 2**16 if low else 2**15, "COPIES": 32, "TILE": 2048}
    name = "triton_kernels.gpu.batch_threshold:digit_histogram_kernel"
    return (name, {**HISTOGRAM, "key_ptr": key}, constants, 4, 3, 64)


def rows(rows_, columns, warps, budget):
    signature, constants = {**ROWS, "n_rows": "i32:16"}, {**EVERYTHING, "ROWS": rows_, "COLUMNS": columns}
    if columns == 1:  # a width of 1, as of a bias, is compiled in
        constants["width"] = 1
        del signature["width"]
    return (ADAM + "adam_rows_kernel", signature, constants, warps, 3, budget)


SPECS = [
    group_max("*bf16", "*i16", False, 64),
    group_max("*fp32", "*i32", True, 64),
    (TOPK + "choose_groups_kernel", {**GROUPS, "maxima_ptr": "*i16"}, choice(1024, 16), 2, 3, 96),
    (TOPK + "choose_groups_kernel", {**GROUPS, "maxima_ptr": "*i32"}, choice(4096, 32), 8, 3, 96),
    features("*bf16", False, True, 1024, 16, 2),
    features("*fp32", True, True, 16384, 32, 16),
    features("*fp32", False, False, 16384, 32, 16),
    pairs("*bf16", "*i16", False, False, False, 64),
    pairs("*bf16", "*i16", False, False, True, 128),
    pairs("*fp32", "*i32", True, True, False, 64),
    pairs("*fp32", "*i32", True, True, True, 168),
    histogram("*i16", False),
    histogram("*i32", True),
    (
        ADAM + "adam_flat_kernel",
        {**STATE, "group_elements": "i32:16", "n_tiles": "i32"},
        {"SCALED": True, "WORKING": True, "TILE": 1024},
        4,
        3,
        64,
    ),
    rows(1, 1024, 4, 64),
    rows(1024, 1, 4, 64),
    rows(1, 4096, 8, 128),
    (ADAM + "adam_long_rows_kernel", ROWS, {**EVERYTHING, "COLUMNS": 4096}, 16, 3, 64),
    (
        "triton_kernels.gpu.adam_rows:row_squares_kernel",
        {"g_ptr": "*fp32", "unit_ptr": "*fp32", "squares_ptr": "*fp32", "n_rows": "i32:16", "width": "i32:16"},
        {"UNIT": True, "ROWS": 1, "COLUMNS": 4096, "SUM": tl.float32},
        16,
        3,
        64,
    ),
]
