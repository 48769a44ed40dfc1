"""report.html: how a training went, as one page that asks no network for anything; several runs compared.
Made from the files of a work directory, during the run and later."""
