"""Attacks on everything that a site promises. Each test is named for what must not happen, and names the hole that it watches.

The adversary is a run: every key, order, label and message that a server can choose within the caps of a careful owner; and
besides it a site that lies to the server, records made to break a round, and whoever can reach the ledger's file. The holes,
all of which the first version had:

1. A configuration alone switches clip and noise off in float32, while the ledger says "good".
2. The last bits of one reply tell two candidate sums apart.
3. The run chooses what the records are, and whether a site answers is then a free predicate of them.
4. One long record changes the gradients of the others in its batch.
5. The check before training compares zeros with zeros, or allows too much.
6. Records that make the model or the reader fail decide whether a site answers.
7. What the accountant assumes, and what it computes at its extremes.
8. Where chance comes from.
9. Older copies of a ledger, evaluations without limit, changed records without a word, lying counters and huge replies.
10. Models that are exact or not.

`attacker` holds the tools. ``LALORA_ATTACK_EXAMPLES`` sets how many orders `test_malicious_server` draws; if it is set, they
are drawn anew each time.
"""
