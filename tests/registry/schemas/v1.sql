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
CREATE TABLE files (
        version_id INTEGER NOT NULL REFERENCES versions ON DELETE CASCADE,
        path TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        bytes INTEGER NOT NULL,
        PRIMARY KEY (version_id, path)
    ) WITHOUT ROWID;
INSERT INTO "files" VALUES(1,'adapter_config.json','ef01',10);
CREATE TABLE names (name TEXT PRIMARY KEY, last_number INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "names" VALUES('support/acme',2);
CREATE TABLE runs (
        folder TEXT PRIMARY KEY,
        sha256 TEXT NOT NULL,
        method TEXT,
        status TEXT NOT NULL,
        created TEXT NOT NULL,
        record TEXT NOT NULL,
        metrics TEXT NOT NULL
    );
INSERT INTO "runs" VALUES('/runs/mine','00','lora','ok','2026-11-24T12:00:00+00:00','{"seed": 3}','{"loss": [1.25, 1.0, 1.5]}');
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
COMMIT;
PRAGMA user_version = 1;
