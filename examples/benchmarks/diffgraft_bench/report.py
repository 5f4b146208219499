def write_report(store, out):
    store.write_csv(out / "rows.csv")
    return out / "report.html"
