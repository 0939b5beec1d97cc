"""Fast R-CNN (Girshick, ICCV 2015) on PASCAL VOC 2007: proposals, RoI sampling, the network, and the evaluation."""

from detection.evaluation import Detections, Truth, coco_ap, positives, rankings, voc_ap, write_detections
from detection.network import FastRCNN, detect, fast_rcnn_loss
from detection.proposals import Proposals, compute_proposals, read_proposals, recall
from detection.sampling import RoIs, make_rois, sample_rois

__all__ = [
    "Detections",
    "FastRCNN",
    "Proposals",
    "RoIs",
    "Truth",
    "coco_ap",
    "compute_proposals",
    "detect",
    "fast_rcnn_loss",
    "make_rois",
    "positives",
    "rankings",
    "read_proposals",
    "recall",
    "sample_rois",
    "voc_ap",
    "write_detections",
]
