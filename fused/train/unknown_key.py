"""The error for an unknown key of a training's configuration: it names the key that was probably meant."""

import difflib
from collections.abc import Sequence

# The last part of keys as other programs call them, in lower case without - and _, and the key here.
SYNONYMS = {
    other: key
    for key, others in {
        "optim.lr": "learningrate baselr initlr",
        "optim.weight_decay": "wd l2",
        "optim.betas": "adambetas optbetas",
        "optim.clip_grad": "clipgradnorm gradclip gradclipval gradientclipval maxgradnorm maxnorm clip",
        "optim.warmup_steps": "warmup numwarmupsteps",
        "optim.floor": "minlr etamin",
        "optim.layer_decay": "llrd layerwiselrdecay",
        "data.frames": "numframes nframes framenum cliplen cliplength allframes",
        "data.size": "imgsize imagesize inputsize cropsize resolution resize",
        "data.stride": "samplingrate framestride frameinterval frameskip",
        "data.workers": "numworkers dataloadernumworkers nworkers",
        "data.train": "traindir traindata trainpath datapath datadir dataset root",
        "data.val": "valdir valdata valpath validation evaldata testdata",
        "data.flip": "hflip horizontalflip",
        "data.scale": "rrcscale cropscale",
        "data.erased": "reprob randomerasing erase erasing randomerasingprob",
        "data.augment": "aa autoaugment randaugment randaug",
        "data.repeats": "numsample repeatedaug repeatedaugmentation",
        "data.fps": "targetfps samplingfps framerate",
        "data.prefix": "videoprefix dataroot rootdir",
        "data.separator": "split sep delimiter",
        "data.frame_pattern": "filenametmpl filenametemplate imagetemplate imagetmpl",
        "batch_size": "bs batch batchsize trainbatchsize perdevicetrainbatchsize",
        "accumulate": "accumiter updatefreq gradientaccumulationsteps gradaccum accumulategradbatches",
        "epochs": "epoch numepochs maxepochs nepochs numtrainepochs",
        "steps": "step numsteps maxsteps iterations iters maxiters totalsteps",
        "out": "output outputdir outdir workdir savedir logdir rundir folder",
        "start": "pretrained pretrainedmodel finetune checkpoint ckpt weights resume init initfrom",
        "teacher": "clipteacher teachermodel teacherpath",
        "precision": "amp dtype fp16 bf16 halfprecision",
        "device": "gpu cuda gpus",
        "parallel": "ddp fsdp strategy distributed",
        "seed": "randomseed rngseed",
        "log_every": "loginterval logfreq printfreq loggingsteps",
        "save_every": "saveinterval savefreq savesteps saveckptfreq",
        "evaluate_every": "evalevery evalinterval evalfreq evalsteps valinterval",
        "save_minutes": "saveminutes checkpointminutes",
        "ema": "modelema modelemadecay emadecay emarate emamomentum",
        "keep": "savetotallimit keepcheckpoints",
        "loss.label_smoothing": "smoothing labelsmooth",
        "loss.distillation": "distillweight distillationweight alpha",
        "mix.mixup": "mixupalpha",
        "mix.cutmix": "cutmixalpha",
        "mix.probability": "mixupprob",
        "mix.switch": "mixupswitchprob switchprob",
        "mask.ratio": "maskratio maskingratio",
        "mask.kind": "masktype maskkind",
        "model.drop_path_rate": "droppath stochasticdepth",
        "model.fc_drop_rate": "dropout headdrop headdroprate",
        "model.kernel_size": "tubeletsize tsize",
        "model.size": "modelsize arch variant modelname",
    }.items()
    for other in others.split()
}


def unknown_key(key: str, allowed: Sequence[str], known: Sequence[str]) -> ValueError:
    """Return the error for an unknown dotted key; the caller raises it.

    `allowed` are the keys of its section, which are listed, `known` the keys of all sections, of which the nearest is named.
    """
    near = nearest(key, known)
    section, _, name = near.rpartition(".")
    elsewhere = f" (in YAML {section}: {{{name}: ...}})" if section and section != key.rpartition(".")[0] else ""
    return ValueError(f"{key} is no key; the nearest is {near}{elsewhere}. Allowed: {', '.join(allowed)}")


def nearest(key: str, known: Sequence[str]) -> str:
    """Return the known key that was probably meant: one of the same last part, of the same meaning, or of a similar name."""
    last = key.rpartition(".")[2]
    same = [one for one in known if one.rpartition(".")[2] == last]
    if same:
        return difflib.get_close_matches(key, same, 1, 0.0)[0]
    synonym = SYNONYMS.get(last.lower().replace("-", "").replace("_", ""))
    if synonym is not None and synonym in known:
        return synonym
    whole = difflib.get_close_matches(key, known, 1, 0.0)[0]
    part = difflib.get_close_matches(last, [one.rpartition(".")[2] for one in known], 1, 0.0)[0]
    if _similarity(last, part) > _similarity(key, whole):
        return difflib.get_close_matches(key, [one for one in known if one.rpartition(".")[2] == part], 1, 0.0)[0]
    return whole


def _similarity(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
