"""The prompts that the experts of emoji-flux are learned from: the 4,608 combinations that its own training saw, none that is held out.

python plugins/phased_dmd/benchmarks/prompts.py > prompts.txt
"""

from diffgraft_checkpoints.emoji import scenes

for labels in scenes.split()[0]:
    print(scenes.caption(labels))
