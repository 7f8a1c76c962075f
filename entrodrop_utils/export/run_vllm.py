"""``run_vllm.py FOLDER IDS.npy STEPS ANSWER.npz``: what vLLM computes of a folder; run by ``other_programs`` with vLLM's Python."""

import os
import sys

import numpy as np


def main(folder: str, ids: str, steps: str, answer: str, *options: str) -> None:
    """Logits after each token, the greedy continuation, and the keys and values of one token, on one thread at 32 bits."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    from vllm import LLM, SamplingParams

    prompt, rows = np.load(ids)[0].tolist(), []
    sizes = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 2} | dict(option.split("=") for option in options)
    llm = LLM(folder, trust_remote_code=True, enforce_eager=True, skip_tokenizer_init=True, **sizes)

    def listen(model) -> None:
        compute = model.compute_logits

        def computed(*args):
            logits = compute(*args)
            rows.append(logits.float().cpu().numpy())
            return logits

        model.compute_logits = computed

    llm.apply_model(listen)
    # logits of a prompt are computed where its log-probabilities are asked for
    settings = SamplingParams(max_tokens=int(steps), temperature=0, prompt_logprobs=1, detokenize=False, ignore_eos=True)
    output = llm.generate([{"prompt_token_ids": prompt}], settings)[0]
    parts = {len(part): part for part in rows[:2]}  # of the prompt but its last token, and of that one, in either order
    cache = llm.llm_engine.vllm_config.cache_config
    np.savez(
        answer,
        logits=np.concatenate([parts[len(prompt) - 1], parts[1]]),
        continuation=list(output.outputs[0].token_ids),
        kv_bytes_per_token=2**30 / (cache.num_gpu_blocks * cache.block_size),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
