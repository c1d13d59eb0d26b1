BEGIN TRANSACTION;
CREATE TABLE bases (
        id INTEGER PRIMARY KEY,
        model_id TEXT NOT NULL,
        revision TEXT NOT NULL,
        weights_sha256 TEXT NOT NULL,
        tokenizer_sha256 TEXT NOT NULL,
        template_sha256 TEXT NOT NULL,
        UNIQUE (model_id, revision, weights_sha256, tokenizer_sha256, template_sha256)
    );
INSERT INTO "bases" VALUES(1,'owner/name','','','','');
CREATE TABLE comparisons (
        folder TEXT PRIMARY KEY,
        sha256 TEXT NOT NULL,
        created TEXT NOT NULL,
        verdict TEXT NOT NULL
    );
INSERT INTO "comparisons" VALUES('/runs/c','00','2026-11-24T12:00:00+00:00','{}');
CREATE TABLE evaluations (
        id INTEGER PRIMARY KEY,
        run_folder TEXT REFERENCES runs ON DELETE CASCADE,
        version_id INTEGER REFERENCES versions ON DELETE CASCADE,
        metric TEXT NOT NULL,
        value REAL NOT NULL,
        low REAL NOT NULL,
        high REAL NOT NULL,
        CHECK ((run_folder IS NULL) <> (version_id IS NULL))
    );
INSERT INTO "evaluations" VALUES(1,'/runs/mine',NULL,'loss',1.25,1.0,1.5);
CREATE TABLE files (
        version_id INTEGER NOT NULL REFERENCES versions ON DELETE CASCADE,
        path TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        PRIMARY KEY (version_id, path)
    ) WITHOUT ROWID;
INSERT INTO "files" VALUES(1,'adapter_config.json','ef01',10);
CREATE TABLE holds (
        id TEXT PRIMARY KEY,
        version_id INTEGER NOT NULL REFERENCES versions,
        owner TEXT NOT NULL,
        pid INTEGER NOT NULL,
        created TEXT NOT NULL
    ) WITHOUT ROWID;
INSERT INTO "holds" VALUES('aa',1,'a server',1,'2026-11-24T12:00:00+00:00');
CREATE TABLE names (name TEXT PRIMARY KEY, last_number INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "names" VALUES('support/acme',2);
CREATE TABLE runs (
        folder TEXT PRIMARY KEY,
        sha256 TEXT NOT NULL,
        method TEXT,
        status TEXT NOT NULL,
        created TEXT NOT NULL,
        record TEXT NOT NULL);
INSERT INTO "runs" VALUES('/runs/mine','00','lora','ok','2026-11-24T12:00:00+00:00','{"seed": 3}');
CREATE TABLE tag_moves (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        tag TEXT NOT NULL,
        number INTEGER,
        moved TEXT NOT NULL
    );
INSERT INTO "tag_moves" VALUES(1,'support/acme','prod',1,'2026-11-24T12:00:00+00:00');
CREATE TABLE tags (
        name TEXT NOT NULL,
        tag TEXT NOT NULL,
        version_id INTEGER NOT NULL REFERENCES versions,
        PRIMARY KEY (name, tag)
    ) WITHOUT ROWID;
INSERT INTO "tags" VALUES('support/acme','prod',1);
CREATE TABLE versions (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL REFERENCES names,
        number INTEGER NOT NULL,
        digest TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        base_id INTEGER REFERENCES bases,
        method TEXT,
        lineage TEXT NOT NULL,
        note TEXT NOT NULL,
        created TEXT NOT NULL,
        UNIQUE (name, number)
    );
INSERT INTO "versions" VALUES(1,'support/acme',1,'abcd',10,1,'lora','{}','','2026-11-24T12:00:00+00:00');
CREATE INDEX runs_created ON runs (created);
CREATE INDEX versions_digest ON versions (digest);
CREATE INDEX tags_version ON tags (version_id);
CREATE INDEX holds_version ON holds (version_id);
CREATE INDEX tag_moves_tag ON tag_moves (name, tag);
CREATE UNIQUE INDEX evaluations_run ON evaluations (run_folder, metric);
CREATE UNIQUE INDEX evaluations_version ON evaluations (version_id, metric);
COMMIT;
PRAGMA user_version = 2;
