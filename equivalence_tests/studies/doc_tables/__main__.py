from equivalence_tests.studies.doc_tables import filled, pages

for path in pages():
    path.write_text(filled(path.read_text()))
