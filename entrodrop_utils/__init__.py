"""EntroDrop: which attention layers, MLPs or blocks of a language model carry little information, and what dropping them costs.

The modules are one straight line, each importing only those before it: profiles, progress, downloads, dequantise, sources, models,
harvest, text, task_items, local_tasks, modeling_entrodrop, families, self_check, sub_blocks, residual, masks, store, entropy,
similarity, scoring, ledger, model_card, dropping, encoders, replay, answers, harness, evaluation, retention, selection, figures,
background, explorer, explorer_choice, explorer_view, explorer_bars, explorer_page, rendered, pages, notebooks.
"""
