"""Evaluation: benchmarks, their scores, and what the voco token looks at.

task.py         what a benchmark is; tasks/ has one a file
run.py          tasks through an exported model; answers.py keeps the answers on disk
retention.py    figures between two bounds, and the paper's
records.py      files of benchmarks, checked; spreadsheets.py tables among them
choices.py      letters of multiple choice; vqa_answers.py has VQA's rules, easy_vqa.py the quick start's data
scenes.py       generated pictures and questions about them; seeds.py what runs of several seeds say
lmms_eval_*.py  the model as lmms-eval sees it
compare.py      two models, tensor by tensor and by their logits
attention.py    where the voco row looks
probes.py       what can be read off an image's representations; labels.py has the files that say what is in images
"""
