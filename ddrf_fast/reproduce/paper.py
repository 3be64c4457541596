"""The figures that the paper prints, by table and method; of its own data, weights and definitions."""

from collections.abc import Mapping, Sequence

from ddrf_fast import _tables

COLUMNS = ("EN", "AG", "SSIM", "VIF", "PSNR", "Mean")

TABLE_3_FLIR = {
    "DDRF": (7.22, 9.43, 0.70, 0.38, 43.66, 10.59),
    "U2Fusion": (7.41, 6.77, 0.70, 0.40, 36.53, 9.05),
    "RFN": (7.46, 2.79, 0.69, 0.28, 34.63, 7.95),
    "PGMI": (7.37, 4.66, 0.70, 0.34, 36.74, 8.73),
    "NestFuse": (7.60, 4.79, 0.68, 0.38, 35.02, 8.56),
    "IFCNN": (7.09, 5.92, 0.76, 0.36, 44.56, 10.19),
    "GFF": (7.34, 5.06, 0.75, 0.37, 43.65, 10.08),
    "GANMCC": (7.32, 3.90, 0.61, 0.30, 28.66, 7.14),
}

TABLE_3_RGBT = {
    "DDRF": (7.71, 21.02, 0.58, 0.31, 35.33, 11.23),
    "U2Fusion": (7.41, 12.98, 0.61, 0.32, 35.12, 9.85),
    "RFN": (7.34, 6.54, 0.60, 0.29, 35.21, 8.83),
    "PGMI": (7.54, 9.71, 0.62, 0.28, 35.37, 9.32),
    "NestFuse": (7.71, 13.07, 0.62, 0.41, 39.79, 11.08),
    "IFCNN": (7.24, 14.11, 0.64, 0.32, 34.19, 9.89),
    "GFF": (7.50, 12.85, 0.64, 0.34, 35.41, 10.03),
    "GANMCC": (6.51, 5.33, 0.53, 0.24, 35.65, 8.43),
}

TABLE_4_GUN = {
    "U2Fusion": (7.23, 7.87, 0.10, 0.01, 20.44, 7.13),
    "RFN": (6.85, 3.00, 0.61, 0.28, 46.56, 11.46),
    "PGMI": (5.98, 5.80, 0.42, 0.17, 27.02, 7.88),
    "NestFuse": (6.84, 4.41, 0.65, 0.35, 49.73, 12.40),
    "IFCNN": (6.93, 7.82, 0.65, 0.38, 46.36, 12.43),
    "GFF": (6.86, 4.35, 0.65, 0.35, 50.02, 12.45),
    "GANMCC": (7.07, 5.48, 0.62, 0.29, 37.91, 10.27),
    "DDRF-H1": (6.91, 6.53, 0.93, 0.77, 53.34, 13.69),
    "DDRF-H2": (6.89, 6.18, 0.95, 0.76, 57.77, 14.51),
    "DDRF-H3": (6.89, 6.18, 0.95, 0.76, 56.81, 14.32),
}

TABLE_4_TNO = {
    "U2Fusion": (3.96, 2.81, 0.44, 0.27, 35.73, 8.64),
    "RFN": (4.88, 1.74, 0.29, 0.24, 33.16, 8.06),
    "PGMI": (5.16, 4.86, 0.67, 0.38, 31.15, 8.44),
    "NestFuse": (5.07, 3.17, 0.46, 0.39, 36.11, 9.04),
    "IFCNN": (5.43, 5.14, 0.56, 0.51, 37.69, 9.87),
    "GFF": (5.09, 3.22, 0.48, 0.39, 36.55, 9.15),
    "GANMCC": (5.63, 2.88, 0.77, 0.34, 49.21, 11.76),
    "DDRF-H1": (6.07, 6.67, 0.90, 0.59, 48.74, 12.59),
    "DDRF-H2": (5.45, 4.18, 0.67, 0.46, 40.69, 10.29),
    "DDRF-H3": (5.79, 6.42, 0.68, 0.52, 40.38, 10.76),
}

# Seconds for a pair of about 400x400, and megabytes of the model; None where the paper has none.
TABLE_2: dict[str, tuple[float | None, float | None]] = {
    "IFCNN": (0.021, 0.32),
    "GANMCC": (None, 10.90),
    "PGMI": (0.044, 0.80),
    "NestFuse": (0.116, 20.80),
    "U2Fusion": (0.857, 1064.96),
    "GFF": (0.094, None),
    "RFN-Nest": (0.119, 18.20),
    "DDRF-Net": (0.028, 7.58),
}


def printed(title: str, table: Mapping[str, Sequence[float]]) -> list[str]:
    """A heading and a table of the paper in Markdown, with the digits that it prints."""
    rows = [[method, *(f"{value:.2f}" for value in values)] for method, values in table.items()]
    return [f"### The paper's figures for {title}", _tables.markdown(["method", *COLUMNS], rows)]
