"""``run_vllm.py FOLDER IDS.npy LOGPROBS.npy``: the log-probability that vLLM gives each token after the first of a prompt."""

import os
import sys

import numpy as np

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, ids, out = sys.argv[1:]
    prompt = np.load(ids)[0].tolist()
    sizes = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 2}
    llm = LLM(folder, trust_remote_code=True, enforce_eager=True, skip_tokenizer_init=True, **sizes)
    settings = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    answer = llm.generate([{"prompt_token_ids": prompt}], settings)[0]
    np.save(out, [row[token].logprob for row, token in zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)])
