"""LASER in 150 lines: find the weight matrix whose low-rank copy answers better, prove it on other questions, save it.

    python examples/laser_in_150_lines.py HuggingFaceTB/SmolLM2-135M-Instruct questions.jsonl out/

A line of questions.jsonl is {"prompt": "The capital of Norway is", "answer": "Oslo"}; ten will run, hundreds will tell.
Lines that phrase one fact may share a "fact", which keeps them on one side. Nothing is needed but torch and transformers.

`laser search --strategy race` goes by the same rules, and does more: it runs batches, and only the blocks from the reduced one
on; it sends random controls along, drops at once what is beaten beyond doubt, takes fused matrices apart, knows experts, gives
intervals, keeps records, and goes on when killed. By default it weakens components of all matrices, under a bound on harm.
"""

import hashlib
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

KEPT = (0.9, 0.75, 0.6, 0.5, 0.4, 0.25, 0.1, 0.075, 0.05, 0.025, 0.02, 0.015, 0.01, 0.005, 0.0025)  # of the singular values
SCREENED = 100  # questions that the screen looks at, at most
WIDTH, SIZES = 48, 3  # candidates that it sends into the race, and sizes of one matrix among them, at most
FIRST, KEEP = 32, 0.34  # questions of the first rung, and share of the candidates that goes on from a rung

if len(sys.argv) != 4:
    sys.exit(__doc__)
name, file, out = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).requires_grad_(False)


# 1. Questions. A fifth of the facts is there to choose on, all others to measure on; the order depends on the ids alone.
def shuffled(texts):
    return sorted(texts, key=lambda text: hashlib.sha256(f"0 {text}".encode()).digest())


probe = tokenizer("a", return_special_tokens_mask=True)
start = probe.input_ids[: probe.special_tokens_mask.index(0)]  # what this tokenizer begins a text with, if anything
questions, fact = {}, {}
for number, line in enumerate(Path(file).read_text(encoding="utf-8-sig").split("\n"), start=1):
    if line.strip():
        given = {key: value for key, value in json.loads(line).items() if value is not None}
        row = {"id": f"line {number}", "fact": "", "joint": " "} | given
        joint = "" if row["prompt"][-1].isspace() or row["answer"][0].isspace() else row["joint"]
        texts = row["prompt"], row["prompt"] + joint + row["answer"]
        prompt, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
        assert whole[: len(prompt)] == prompt != whole, f"line {number}: a token spans the end of the prompt; end it on a word"
        assert row["id"] not in questions, f"line {number}: the id {row['id']} is there already"
        questions[row["id"]] = torch.tensor([start + whole], device=device), len(start + prompt)  # (1, T), the answer's place
        fact[row["id"]] = str(row["fact"]) or row["id"]
fifth = set(shuffled(set(fact.values()))[: max(1, len(set(fact.values())) // 5)])
validation = [questions[i] for i in shuffled(questions) if fact[i] in fifth]
test = [questions[i] for i in shuffled(questions) if fact[i] not in fifth]

# 2. Matrices. All weights in the blocks, each decomposed once, W = left @ right, so that every low-rank copy is a slice.
weights = {path: W for path, W in model.named_parameters() if W.ndim == 2 and path.endswith(".weight")}
matrices = {path: W for path, W in weights.items() if any(part.isdigit() for part in path.split("."))}
original = {path: W.data for path, W in matrices.items()}
factors = {}
for path, W in original.items():
    tall = W.float() if W.shape[0] >= W.shape[1] else W.float().T
    V = torch.linalg.eigh(tall.double().T @ tall.double())[1].flip(1).float()  # (k, k), k = min(m, n)
    factors[path] = (tall @ V, V.T) if W.shape[0] >= W.shape[1] else (V, V.T @ tall.T)  # (m, k), (k, n)
    matrices[path].requires_grad_()


def put(candidate):
    """Let every matrix be as it was, and a low-rank copy stand in for the candidate's; None is the unchanged model."""
    for path, W in matrices.items():
        W.data = original[path]
    if candidate:
        path, rank = candidate
        left, right = factors[path]
        matrices[path].data = (left[:, :rank] @ right[:rank]).to(original[path])  # (m, n)


# 3. Scores. Whether greedy decoding would give the whole answer, and the mean log-probability of its tokens, in nats.
def answer(ids, place):
    logits = model(ids[:, :-1], use_cache=False).logits[0, place - 1 :].float()  # (answer, vocabulary)
    targets = ids[0, place:]  # (answer,)
    return bool((logits.argmax(-1) == targets).all()), -torch.nn.functional.cross_entropy(logits, targets)


@torch.no_grad()
def score(candidate, questions):
    put(candidate)
    return [(right, logprob.item()) for right, logprob in (answer(*question) for question in questions)]


def means(scores):
    """Return accuracy and log-probability, by which candidates are ranked: by the second where the first is the same."""
    return [sum(column) / len(scores) for column in zip(*scores, strict=True)]


# 4. The screen. One gradient tells of every rank of every matrix what dropping the components beyond it would change.
changes = {path: [] for path in matrices}
for ids, place in validation[-min(SCREENED, max(len(validation) - FIRST, (len(validation) + 1) // 2)) :]:
    model.zero_grad()
    answer(ids, place)[1].backward()
    for path, (left, right) in factors.items():
        shares = ((left.T @ matrices[path].grad.float()) * right).sum(1)  # (k,): sigma_i times the derivative by sigma_i
        changes[path].append(shares.flip(0).cumsum(0).flip(0))  # (k,): entry r is the change of loss without r, r + 1, ...
expected, chosen = {}, []
for path, of_questions in changes.items():
    each = torch.stack(of_questions)  # (questions, k)
    spread = each.var(0, correction=min(1, len(each) - 1))  # (k,)
    guess = (each.mean(0) + spread / 2).tolist()  # to first order, and what is added by the loss bending upwards
    expected |= {(path, rank): guess[rank] for rank in (int(kept * len(guess)) for kept in KEPT)}
    chosen += sorted((c for c in expected if c[0] == path), key=expected.get)[:SIZES]
chosen = sorted(chosen, key=expected.get)[:WIDTH]

# 5. The race. Candidates meet more and more questions, and after each rung most leave; sizes next to the leader's join.
scores, alive, leader, n = defaultdict(list), chosen, None, 0
while alive:
    n = max(FIRST, 2 * n)
    n = n if 2 * n <= len(validation) else len(validation)
    running = dict.fromkeys([None, leader, *alive])
    for c in running:
        scores[c] += score(c, validation[len(scores[c]) : n])
    ranked = sorted(running, key=lambda c: means(scores[c]), reverse=True)
    leader = ranked[0]
    title = f"rank {leader[1]} of {leader[0]}" if leader else "the unchanged model"
    print(f"{n} questions, {len(alive)} candidates: {means(scores[leader])[0]:.1%} right under {title}")
    sizes = sorted(rank for path, rank in expected if leader and path == leader[0])
    near = [(leader[0], rank) for i, rank in enumerate(sizes) if leader[1] in sizes[max(0, i - 1) : i + 2]]
    if n < len(validation):
        ranked.remove(None)  # it runs along to the end
        by_loss = sorted(ranked, key=lambda c: means(scores[c])[1], reverse=True)  # says more while questions are few
        by_turns = dict.fromkeys(c for pair in zip(ranked, by_loss, strict=True) for c in pair)
        alive = [*by_turns][: max(1, int(KEEP * len(alive)))] + [c for c in near if c not in scores]
    else:
        alive = [c for c in near if len(scores[c]) < n]  # the last leader's may have left, or never run

# 6. The proof, on questions that had no part in the choice. By chance, they would turn right or wrong as a coin falls.
if leader is None:
    sys.exit("No candidate beat the unchanged model.")
before, after = score(None, test), score(leader, test)
turns = [(was, now) for (was, _), (now, _) in zip(before, after, strict=True)]
corrected, broken = turns.count((False, True)), turns.count((True, False))
tail = sum(math.comb(corrected + broken, i) for i in range(min(corrected, broken) + 1))
p = min(1.0, 2 * tail / 2 ** (corrected + broken))  # McNemar's exact test
(base, base_logprob), (gained, logprob) = means(before), means(after)
print(f"{title}, on {len(test)} other questions: {base:.1%} -> {gained:.1%} right, {corrected} corrected, {broken} broken,")
print(f"exact p {p:.2g}; loss {-base_logprob:.3f} -> {-logprob:.3f} nats per token of the answer")
model.save_pretrained(out)  # as it was scored last: an ordinary checkpoint
tokenizer.save_pretrained(out)
