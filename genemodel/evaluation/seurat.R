# Runs one R original on cells that Python wrote, and writes the result for Python to read.
#
#   Rscript seurat.R METHOD FOLDER WIDTH GENES
#
# FOLDER holds matrix.mtx (genes x cells) and batch.csv (one batch a line, no header). METHOD is
#   combat_r               sva::ComBat on log-normalised values; result = corrected genes x cells
#   seurat_cca seurat_rpca Seurat anchors on raw counts; result = components x cells
# result.bin is little-endian float64 in column-major order, shape.txt its two dimensions.
arguments <- commandArgs(trailingOnly = TRUE)
method <- arguments[1]
folder <- arguments[2]
width <- as.integer(arguments[3])
n_genes <- as.integer(arguments[4])
set.seed(1)

matrix <- as(Matrix::readMM(file.path(folder, "matrix.mtx")), "CsparseMatrix")
batch <- readLines(file.path(folder, "batch.csv"))
rownames(matrix) <- paste0("g", seq_len(nrow(matrix)))
colnames(matrix) <- paste0("c", seq_len(ncol(matrix)))

combat <- function() {
  sva::ComBat(dat = as.matrix(matrix), batch = batch, par.prior = TRUE)
}

anchors <- function(reduction) {
  suppressPackageStartupMessages(library(Seurat))
  parts <- lapply(split(colnames(matrix), batch), function(cells) {
    part <- CreateSeuratObject(matrix[, cells])
    part <- NormalizeData(part, verbose = FALSE)
    FindVariableFeatures(part, nfeatures = n_genes, verbose = FALSE)
  })
  features <- SelectIntegrationFeatures(parts, nfeatures = n_genes, verbose = FALSE)
  smallest <- min(sapply(parts, ncol))
  dims <- seq_len(min(width, smallest - 1))
  if (reduction == "rpca") {
    parts <- lapply(parts, function(part) {
      part <- ScaleData(part, features = features, verbose = FALSE)
      RunPCA(part, features = features, npcs = length(dims), verbose = FALSE)
    })
  }
  # Seurat's defaults presume at least 200 cells in every batch; smaller ones lower them.
  found <- FindIntegrationAnchors(
    parts, anchor.features = features, reduction = reduction, dims = dims,
    k.filter = min(200, smallest - 1), k.score = min(30, smallest - 1), verbose = FALSE
  )
  # a cell is moved by its nearest anchors: no more than the pair of batches with fewest has
  pairs <- split(found@anchors, found@anchors[c("dataset1", "dataset2")], drop = TRUE)
  fewest <- min(sapply(pairs, function(pair) length(unique(pair$cell2))))
  k <- max(2, min(100, smallest - 1, fewest - 1))
  whole <- IntegrateData(found, dims = dims, k.weight = k, verbose = FALSE)
  DefaultAssay(whole) <- "integrated"
  whole <- ScaleData(whole, verbose = FALSE)
  whole <- RunPCA(whole, npcs = width, verbose = FALSE)
  t(Embeddings(whole, "pca")[colnames(matrix), ])
}

result <- switch(method,
  combat_r = combat(),
  seurat_cca = anchors("cca"),
  seurat_rpca = anchors("rpca"),
  stop("unknown method ", method)
)
writeBin(as.vector(result), file.path(folder, "result.bin"), size = 8, endian = "little")
writeLines(as.character(dim(result)), file.path(folder, "shape.txt"))
