"""What generated cells are made of: cell types, gene programs, platforms, tissues.

Genes are named by human symbols; those that a vocabulary does not have are passed over.
"""

# Cell types with well-known markers, in the order in which they are used, and their lineage.
TYPES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("CD4 T cell", "lymphoid", ("CD3D", "CD3E", "IL7R", "CD4", "LTB", "TCF7")),
    ("B cell", "B", ("CD79A", "CD79B", "MS4A1", "CD19", "BANK1")),
    ("classical monocyte", "myeloid", ("CD14", "LYZ", "S100A8", "S100A9", "VCAN")),
    ("NK cell", "lymphoid", ("NKG7", "KLRD1", "PRF1", "GZMB", "NCR1")),
    ("fibroblast", "stroma", ("COL1A1", "COL1A2", "DCN", "LUM", "PDGFRA")),
    ("dendritic cell", "myeloid", ("FLT3", "CLEC10A", "CST3", "CD74", "FCER1A")),
    ("CD8 T cell", "lymphoid", ("CD3D", "CD3E", "CD8A", "CD8B", "CCL5", "GZMK")),
    ("endothelial cell", "endothelium", ("PECAM1", "VWF", "CDH5", "CLDN5", "KDR")),
    ("epithelial cell", "epithelium", ("EPCAM", "KRT8", "KRT18", "CDH1")),
    ("plasma cell", "B", ("JCHAIN", "MZB1", "XBP1", "SDC1", "TNFRSF17")),
    ("macrophage", "myeloid", ("CD68", "C1QA", "C1QB", "APOE", "MRC1")),
    ("erythroblast", "erythroid", ("HBB", "HBA1", "GYPA", "ALAS2", "SLC4A1")),
    ("smooth muscle cell", "stroma", ("ACTA2", "TAGLN", "MYH11", "CNN1")),
    ("neutrophil", "myeloid", ("CSF3R", "CXCR2", "MMP9", "S100A8", "S100A9")),
    ("hematopoietic stem cell", "progenitor", ("CD34", "KIT", "GATA2", "MEIS1")),
    ("megakaryocyte", "erythroid", ("PF4", "PPBP", "GP9", "ITGA2B")),
    ("mast cell", "myeloid", ("KIT", "CPA3", "MS4A2", "HDC")),
    ("pericyte", "stroma", ("RGS5", "PDGFRB", "CSPG4", "NOTCH3")),
    ("hepatocyte", "epithelium", ("ALB", "APOA1", "TTR", "SERPINA1")),
    ("beta cell", "endocrine", ("INS", "IAPP", "PDX1", "NKX6-1")),
    ("alpha cell", "endocrine", ("GCG", "ARX", "TTR", "IRX2")),
    ("neuron", "neural", ("RBFOX3", "SYT1", "SNAP25", "MAP2")),
    ("astrocyte", "neural", ("GFAP", "AQP4", "SLC1A3", "GJA1")),
    ("oligodendrocyte", "neural", ("MBP", "PLP1", "MOG", "MOBP")),
)
PROGRAMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cell cycle", ("MKI67", "TOP2A", "CDK1", "CCNB1", "PCNA", "TYMS", "UBE2C", "BIRC5", "CENPF")),
    ("stress", ("FOS", "JUN", "JUNB", "HSPA1A", "HSPA8", "DNAJB1", "EGR1", "ATF3", "DUSP1")),
    ("interferon", ("ISG15", "IFI6", "IFIT1", "IFIT3", "MX1", "OAS1", "STAT1", "IRF7", "IFI44")),
    ("metabolism", ("PGK1", "LDHA", "ENO1", "ALDOA", "PKM", "TPI1", "GAPDH", "HIF1A", "VEGFA")),
)
HOUSEKEEPING = tuple(
    (
        "ACTB ACTG1 B2M EEF1A1 EEF2 TPT1 TMSB4X TMSB10 FTL FTH1 GAPDH UBC UBB PTMA NACA "
        "FAU HNRNPA1 EIF1 CFL1 PFN1 MYL6 OAZ1 SERF2 H3-3B PPIA MALAT1 NEAT1 HSP90AB1 "
    ).split()
)
# Assay, depth relative to the first, spread of the log library, ambient share, strength of dropout.
PLATFORMS: tuple[tuple[str, float, float, float, float], ...] = (
    ("10x 3' v3", 1.00, 0.40, 0.02, 0.10),
    ("10x 3' v2", 0.55, 0.45, 0.04, 0.18),
    ("10x 5' v1", 0.75, 0.45, 0.03, 0.14),
    ("inDrop", 0.40, 0.50, 0.06, 0.25),
    ("Drop-seq", 0.35, 0.55, 0.08, 0.25),
)
TISSUES = ("blood", "bone marrow", "lung")
