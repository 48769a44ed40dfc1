"""What launch/predict.py --scenes does, as a Python function: segment images of any size by windows.

In: a config, trained weights, and rasters or images, whose rows are split over the processes that a launcher started.
Out: of each a label map as a GeoTIFF, and polygons.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from internseg_ds.data.image_files import find_images
from internseg_ds.distributed.construction import build_on_meta
from internseg_ds.errors import are, counted
from internseg_ds.evaluation.inference import InferenceRun, trained_segmentor
from internseg_ds.evaluation.predict import classes_of, test_pipeline
from internseg_ds.evaluation.scenes.outputs import SceneOutputs, check_outputs, outputs_of
from internseg_ds.evaluation.scenes.pixel_steps import PixelSteps
from internseg_ds.evaluation.scenes.scene_file import Scene
from internseg_ds.evaluation.scenes.segmentation import (
    SceneOptions,
    SceneSegmentation,
    check_slides,
)
from internseg_ds.evaluation.sliding_window import SlidingWindowInference
from internseg_ds.output_files import make_folder, output_folder
from internseg_ds.progress import tracked

log = logging.getLogger(__name__)


def predict_scenes(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike,
    scenes: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    options: SceneOptions | None = None,
    ema: bool = False,
    cfg_options: Mapping[str, Any] | None = None,
) -> list[SceneOutputs]:
    """Write NAME_labels.tif into `out` for every scene, and where asked for NAME_shapes.geojson. Collective.

    scenes: files, folders and globs. Raises UserError when config, scenes or checkpoint cannot work, before any process
    takes its device, and when there is a result already; later, FaultError for a scene that is damaged further in, and
    OutputError when the disk is full.
    """
    options = options or SceneOptions()
    run = InferenceRun.open(config, checkpoint, ema=ema, cfg_options=cfg_options)
    check_slides(run.experiment.model.test_cfg, run.experiment.path)
    folder = output_folder(out, "--out")
    files = find_images(scenes)
    outputs = {path: outputs_of(path, folder, shapes=options.shapes) for path in files}
    check_outputs(outputs)
    steps = PixelSteps.of(test_pipeline(run.experiment))
    meta_model = build_on_meta(run.experiment.model)
    for path in files:
        with Scene(path, steps) as scene:
            scene.check_model(meta_model)
    classes, palette = classes_of(run.experiment, run.check_weights(meta_model))
    with trained_segmentor(run) as forwards:
        segmentation = SceneSegmentation(
            SlidingWindowInference(forwards), list(classes), palette, options, run.world, run.world.device
        )
        make_folder(folder)
        if steps.left_out:
            log.info(
                "%s of data.test's pipeline %s left out: scenes are segmented at the resolution that they have",
                " and ".join(steps.left_out),
                are(len(steps.left_out)),
            )
        for path in tracked(files, "segmenting scenes", len(files), "scenes") if len(files) > 1 else files:
            with Scene(path, steps) as scene:
                segmentation.segment(scene, outputs[path])
        log.info("%s: label maps are in %s", counted(len(files), "scene"), folder)
    return list(outputs.values())
