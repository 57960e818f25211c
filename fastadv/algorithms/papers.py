"""The papers whose methods fastadv has, each once. Facts are those of the papers themselves; an
arXiv number that is not certain is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fastadv.algorithms.paper import Paper

_NEURIPS = "Advances in Neural Information Processing Systems"
_ICLR = "International Conference on Learning Representations"
_ICML = "International Conference on Machine Learning"
_CVPR = "IEEE/CVF Conference on Computer Vision and Pattern Recognition"
_ICCV = "IEEE/CVF International Conference on Computer Vision"
_ECCV = "European Conference on Computer Vision"
_AAAI = "AAAI Conference on Artificial Intelligence"
_GAMA = ("Gaurang Sriramanan", "Sravanti Addepalli", "Arya Baburaj", "R. Venkatesh Babu")

PAPERS = (
    Paper(
        "Goodfellow et al. 2015",
        "Explaining and Harnessing Adversarial Examples",
        ("Ian J. Goodfellow", "Jonathon Shlens", "Christian Szegedy"),
        2015, _ICLR, arxiv="1412.6572",
    ),
    Paper(
        "Szegedy et al. 2016",
        "Rethinking the Inception Architecture for Computer Vision",
        ("Christian Szegedy", "Vincent Vanhoucke", "Sergey Ioffe", "Jonathon Shlens",
         "Zbigniew Wojna"),
        2016, "IEEE Conference on Computer Vision and Pattern Recognition", arxiv="1512.00567",
    ),
    Paper(
        "Kurakin et al. 2017",
        "Adversarial Machine Learning at Scale",
        ("Alexey Kurakin", "Ian J. Goodfellow", "Samy Bengio"),
        2017, _ICLR, arxiv="1611.01236",
    ),
    Paper(
        "Madry et al. 2018",
        "Towards Deep Learning Models Resistant to Adversarial Attacks",
        ("Aleksander Madry", "Aleksandar Makelov", "Ludwig Schmidt", "Dimitris Tsipras",
         "Adrian Vladu"),
        2018, _ICLR, arxiv="1706.06083",
    ),
    Paper(
        "Ross and Doshi-Velez 2018",
        "Improving the Adversarial Robustness and Interpretability of Deep Neural Networks by "
        "Regularizing Their Input Gradients",
        ("Andrew Slavin Ross", "Finale Doshi-Velez"),
        2018, _AAAI, arxiv="1711.09404",
    ),
    Paper(
        "Izmailov et al. 2018",
        "Averaging Weights Leads to Wider Optima and Better Generalization",
        ("Pavel Izmailov", "Dmitrii Podoprikhin", "Timur Garipov", "Dmitry Vetrov",
         "Andrew Gordon Wilson"),
        2018, "Conference on Uncertainty in Artificial Intelligence", arxiv="1803.05407",
    ),
    Paper(
        "Zhang et al. 2019",
        "Theoretically Principled Trade-off between Robustness and Accuracy",
        ("Hongyang Zhang", "Yaodong Yu", "Jiantao Jiao", "Eric P. Xing", "El Ghaoui, Laurent",
         "Michael I. Jordan"),
        2019, _ICML, arxiv="1901.08573", also=("yaodongyu/TRADES",),
    ),
    Paper(
        "Shafahi et al. 2019",
        "Adversarial Training for Free!",
        ("Ali Shafahi", "Mahyar Najibi", "Amin Ghiasi", "Zheng Xu", "John Dickerson",
         "Christoph Studer", "Larry S. Davis", "Gavin Taylor", "Tom Goldstein"),
        2019, _NEURIPS, arxiv="1904.12843",
    ),
    Paper(
        "Carmon et al. 2019",
        "Unlabeled Data Improves Adversarial Robustness",
        ("Yair Carmon", "Aditi Raghunathan", "Ludwig Schmidt", "Percy Liang", "John C. Duchi"),
        2019, _NEURIPS, arxiv="1905.13736",
    ),
    Paper(
        "Moosavi-Dezfooli et al. 2019",
        "Robustness via Curvature Regularization, and Vice Versa",
        ("Seyed-Mohsen Moosavi-Dezfooli", "Alhussein Fawzi", "Jonathan Uesato",
         "Pascal Frossard"),
        2019, _CVPR, arxiv="1811.09716",
    ),
    Paper(
        "Wong et al. 2020",
        "Fast Is Better Than Free: Revisiting Adversarial Training",
        ("Eric Wong", "Leslie Rice", "J. Zico Kolter"),
        2020, _ICLR, arxiv="2001.03994", also=("locuslab/fast_adversarial",),
    ),
    Paper(
        "Rice et al. 2020",
        "Overfitting in Adversarially Robust Deep Learning",
        ("Leslie Rice", "Eric Wong", "J. Zico Kolter"),
        2020, _ICML, arxiv="2002.11569", also=("locuslab/robust_overfitting",),
    ),
    Paper(
        "Zheng et al. 2020",
        "Efficient Adversarial Training with Transferable Adversarial Examples",
        ("Haizhong Zheng", "Ziqi Zhang", "Juncheng Gu", "Honglak Lee", "Atul Prakash"),
        2020, _CVPR, arxiv="1912.11969", also=("hzzheng93/ATTA",),
    ),
    Paper(
        "Wu et al. 2020",
        "Adversarial Weight Perturbation Helps Robust Generalization",
        ("Dongxian Wu", "Shu-Tao Xia", "Yisen Wang"),
        2020, _NEURIPS, arxiv="2004.05884", also=("csdongxian/AWP",),
    ),
    Paper(
        "Wang et al. 2020",
        "Improving Adversarial Robustness Requires Revisiting Misclassified Examples",
        ("Yisen Wang", "Difan Zou", "Jinfeng Yi", "James Bailey", "Xingjun Ma", "Quanquan Gu"),
        2020, _ICLR, also=("YisenWang/MART",),
    ),
    Paper(
        "Andriushchenko and Flammarion 2020",
        "Understanding and Improving Fast Adversarial Training",
        ("Maksym Andriushchenko", "Nicolas Flammarion"),
        2020, _NEURIPS, arxiv="2007.02617",
    ),
    Paper(
        "Zhang et al. 2020",
        "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger",
        ("Jingfeng Zhang", "Xilie Xu", "Bo Han", "Gang Niu", "Lizhen Cui", "Masashi Sugiyama",
         "Mohan Kankanhalli"),
        2020, _ICML, arxiv="2002.11242", also=("zjfheart/Friendly-Adversarial-Training",),
    ),
    Paper(
        "Gupta et al. 2020",
        "Improving the Affordability of Robustness Training for DNNs",
        ("Sidharth Gupta", "Parijat Dube", "Ashish Verma"),
        2020, "", arxiv="2002.04237",
    ),
    Paper(
        "Huang et al. 2020",
        "Self-Adaptive Training: Beyond Empirical Risk Minimization",
        ("Lang Huang", "Chao Zhang", "Hongyang Zhang"),
        2020, _NEURIPS, arxiv="2002.10319",
    ),
    Paper(
        "Sriramanan et al. 2020",
        "Guided Adversarial Attack for Evaluating and Enhancing Adversarial Defenses",
        _GAMA, 2020, _NEURIPS, arxiv="2011.14969", also=("val-iisc/GAMA-GAT",),
    ),
    Paper(
        "Li et al. 2020",
        "Overfitting or Underfitting? Understand Robustness Drop in Adversarial Training",
        ("Zichao Li", "Liyuan Liu", "Chengyu Dong", "Jingbo Shang"),
        2020, "", arxiv="2010.08034", also=("APART",),
    ),
    Paper(
        "Kim et al. 2021",
        "Understanding Catastrophic Overfitting in Single-step Adversarial Training",
        ("Hoki Kim", "Woojin Lee", "Jaewook Lee"),
        2021, _AAAI, arxiv="2010.01799",
    ),
    Paper(
        "Pang et al. 2021",
        "Bag of Tricks for Adversarial Training",
        ("Tianyu Pang", "Xiao Yang", "Yinpeng Dong", "Hang Su", "Jun Zhu"),
        2021, _ICLR, arxiv="2010.00467",
    ),
    Paper(
        "Zhang et al. 2021",
        "Geometry-aware Instance-reweighted Adversarial Training",
        ("Jingfeng Zhang", "Jianing Zhu", "Gang Niu", "Bo Han", "Masashi Sugiyama",
         "Mohan Kankanhalli"),
        2021, _ICLR, arxiv="2010.01736",
    ),
    Paper(
        "Chen et al. 2021",
        "Robust Overfitting May Be Mitigated by Properly Learned Smoothening",
        ("Tianlong Chen", "Zhenyu Zhang", "Sijia Liu", "Shiyu Chang", "Zhangyang Wang"),
        2021, _ICLR, also=("VITA-Group/Alleviate-Robust-Overfitting",),
    ),
    Paper(
        "Sriramanan et al. 2021",
        "Towards Efficient and Effective Adversarial Training",
        _GAMA, 2021, _NEURIPS, also=("val-iisc/NuAT",),
    ),
    Paper(
        "Rebuffi et al. 2021",
        "Data Augmentation Can Improve Robustness",
        ("Sylvestre-Alvise Rebuffi", "Sven Gowal", "Dan A. Calian", "Florian Stimberg",
         "Olivia Wiles", "Timothy A. Mann"),
        2021, _NEURIPS, arxiv="2111.05328",
    ),
    Paper(
        "Dong et al. 2022",
        "Exploring Memorization in Adversarial Training",
        ("Yinpeng Dong", "Ke Xu", "Xiao Yang", "Tianyu Pang", "Zhijie Deng", "Hang Su",
         "Jun Zhu"),
        2022, _ICLR, arxiv="2106.01606", also=("Memorization",),
    ),
    Paper(
        "Rade and Moosavi-Dezfooli 2022",
        "Reducing Excessive Margin to Achieve a Better Accuracy vs. Robustness Trade-off",
        ("Rahul Rade", "Seyed-Mohsen Moosavi-Dezfooli"),
        2022, _ICLR, also=("imrahulr/hat",),
    ),
    Paper(
        "Tack et al. 2022",
        "Consistency Regularization for Adversarial Robustness",
        ("Jihoon Tack", "Sihyun Yu", "Jongheon Jeong", "Minseon Kim", "Sung Ju Hwang",
         "Jinwoo Shin"),
        2022, _AAAI, arxiv="2103.04623",
    ),
    Paper(
        "Yu et al. 2022",
        "Robust Weight Perturbation for Adversarial Training",
        ("Chaojian Yu", "Bo Han", "Mingming Gong", "Li Shen", "Shiming Ge", "Bo Du",
         "Tongliang Liu"),
        2022, "International Joint Conference on Artificial Intelligence", arxiv="2205.14826",
        also=("RWP", "ChaojianYu/Robust-Weight-Perturbation"),
    ),
    Paper(
        "de Jorge et al. 2022",
        "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training",
        ("de Jorge, Pau", "Adel Bibi", "Riccardo Volpi", "Amartya Sanyal", "Philip H. S. Torr",
         "Grégory Rogez", "Puneet K. Dokania"),
        2022, _NEURIPS, arxiv="2202.01181",
    ),
    Paper(
        "Jia et al. 2022",
        "Prior-Guided Adversarial Initialization for Fast Adversarial Training",
        ("Xiaojun Jia", "Yong Zhang", "Xingxing Wei", "Baoyuan Wu", "Ke Ma", "Jue Wang",
         "Xiaochun Cao"),
        2022, _ECCV, arxiv="2207.08859", also=("jiaxiaojunQAQ/FGSM-PGI",),
    ),
    Paper(
        "Addepalli et al. 2022",
        "Efficient and Effective Augmentation Strategy for Adversarial Training",
        ("Sravanti Addepalli", "Samyak Jain", "R. Venkatesh Babu"),
        2022, _NEURIPS, arxiv="2210.15318", also=("val-iisc/DAJAT",),
    ),
    Paper(
        "Li and Spratling 2023",
        "Understanding and Combating Robust Overfitting via Input Loss Landscape Analysis and "
        "Regularization",
        ("Lin Li", "Michael Spratling"),
        2023, "Pattern Recognition", journal=True, arxiv="2212.04985",
        also=("AdvLC", "TreeLLi/Combating-RO-AdvLC"),
    ),
    Paper(
        "Debenedetti et al. 2023",
        "A Light Recipe to Train Robust Vision Transformers",
        ("Edoardo Debenedetti", "Vikash Sehwag", "Prateek Mittal"),
        2023, "IEEE Conference on Secure and Trustworthy Machine Learning", arxiv="2209.07399",
        also=("dedeswim/vits-robustness-torch",),
    ),
    Paper(
        "Golgooni et al. 2023",
        "ZeroGrad: Costless Conscious Remedies for Catastrophic Overfitting in the FGSM "
        "Adversarial Training",
        ("Zeinab Golgooni", "Mehrdad Saberi", "Masih Eskandar", "Mohammad Hossein Rohban"),
        2023, "Intelligent Systems with Applications", journal=True, arxiv="2103.15476",
    ),
    Paper(
        "Zhao et al. 2023",
        "Fast Adversarial Training with Smooth Convergence",
        ("Mengnan Zhao", "Lihe Zhang", "Yuqiu Kong", "Baocai Yin"),
        2023, _ICCV, arxiv="2308.12857",
    ),
    Paper(
        "Lin et al. 2023",
        "Eliminating Catastrophic Overfitting via Abnormal Adversarial Examples Regularization",
        ("Runqi Lin", "Chaojian Yu", "Tongliang Liu"),
        2023, _NEURIPS, arxiv="2404.08154",
    ),
    Paper(
        "Abad Rocamora et al. 2024",
        "Efficient Local Linearity Regularization to Overcome Catastrophic Overfitting",
        ("Abad Rocamora, Elias", "Fanghui Liu", "Grigorios G. Chrysos", "Pablo M. Olmos",
         "Volkan Cevher"),
        2024, _ICLR, arxiv="2401.11618", also=("LIONS-EPFL/ELLE",),
    ),
    Paper(
        "Cui et al. 2024",
        "Decoupled Kullback-Leibler Divergence Loss",
        ("Jiequan Cui", "Zhuotao Tian", "Zhisheng Zhong", "Xiaojuan Qi", "Bei Yu",
         "Hanwang Zhang"),
        2024, _NEURIPS, arxiv="2305.13948", also=("jiequancui/DKL",),
    ),
    Paper(
        "Pan et al. 2024",
        "Adversarial Initialization with Universal Adversarial Perturbation: A New Approach to "
        "Fast Adversarial Training",
        ("Chao Pan", "Qing Li", "Xin Yao"),
        2024, _AAAI,
    ),
    Paper(
        "Wang et al. 2024",
        "Preventing Catastrophic Overfitting in Fast Adversarial Training: A Bi-level "
        "Optimization Perspective",
        ("Zhaoxin Wang", "Handing Wang", "Cong Tian", "Yaochu Jin"),
        2024, _ECCV, arxiv="2407.12443",
    ),
    Paper(
        "Nguyen et al. 2024",
        "On Intriguing Layer-Wise Properties of Robust Overfitting in Adversarial Training",
        ("Duke Nguyen", "Chaojian Yu", "Vinoth Nandakumar", "Young Choon Lee", "Tongliang Liu"),
        2024, "Transactions on Machine Learning Research", journal=True,
        url="https://openreview.net/forum?id=phk5CcKTcc",
        also=("RAT", "dukeng96/layerwise-robust-overfitting", "ChaojianYu/Layer-Wise-RO"),
    ),
    Paper(
        "Pan et al. 2025",
        "Mitigating Catastrophic Overfitting in Fast Adversarial Training via Label Information "
        "Elimination",
        ("Chao Pan", "Ke Tang", "Qing Li", "Xin Yao"),
        2025, _ICCV,
    ),
)  # fmt: skip
"""In the order of their years."""


def papers_in(*texts: str) -> list[Paper]:
    """The papers that ``texts`` cite, as "Wong et al. 2020", "(Zhao et al., ICCV 2023)", by their
    short name (APART) or by a repository of theirs; in the order of ``PAPERS``."""
    text = " ".join(" ".join(texts).split())
    return [paper for paper in PAPERS if _pattern(paper).search(text)]


def _pattern(paper: Paper) -> re.Pattern[str]:
    authors, _, year = paper.cited.rpartition(" ")
    ways = [rf"{re.escape(authors)},? (?:[A-Za-z]+ )?{year}", *map(re.escape, paper.also)]
    return re.compile(rf"(?<![\w/-])(?:{'|'.join(ways)})(?![\w-])")


def entries(papers: Iterable[Paper]) -> str:
    """The entries of ``papers`` for BibTeX, ready to paste."""
    return "\n\n".join(paper.bibtex() for paper in papers)
