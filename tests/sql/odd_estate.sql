-- Materialized views with everything that can be odd about one. <owner>, <reader>, <other>, <everyday>, <Public> and
-- <tablespace> stand for names. Statements end with a semicolon at the end of a line.
SET search_path = estate, public;
CREATE SCHEMA estate;
CREATE SCHEMA "Other Schema";
GRANT USAGE, CREATE ON SCHEMA estate, "Other Schema" TO <owner>;
GRANT USAGE ON SCHEMA estate TO <reader>;

CREATE TYPE mood AS ENUM ('sad', 'it''s ok', 'HAPPY');
CREATE DOMAIN positive AS integer CHECK (VALUE > 0);
CREATE TYPE point3 AS (x integer, "Y" text, z double precision);
CREATE COLLATION backwards FROM "POSIX";
CREATE COLLATION "Other Schema"."C again" FROM "C";
CREATE FUNCTION lower(text) RETURNS text IMMUTABLE LANGUAGE sql AS $$ SELECT 'not the built-in one: ' || $1 $$;
CREATE FUNCTION "Other Schema"."Odd Func"(integer) RETURNS integer IMMUTABLE LANGUAGE sql AS $$ SELECT $1 + 1 $$;
CREATE OPERATOR "Other Schema".=== (LEFTARG = integer, RIGHTARG = integer, PROCEDURE = int4eq);
CREATE ACCESS METHOD heap_again TYPE TABLE HANDLER heap_tableam_handler;
CREATE OPERATOR CLASS "Other Schema"."Odd ops" FOR TYPE integer USING btree
    AS OPERATOR 1 <, OPERATOR 2 <=, OPERATOR 3 =, OPERATOR 4 >=, OPERATOR 5 >, FUNCTION 1 btint4cmp(integer, integer);

CREATE TABLE source (id integer PRIMARY KEY, a integer, b text, "Select" varchar(20), d date, t timestamptz, j jsonb,
    m mood DEFAULT 'it''s ok', p positive DEFAULT 7, v tsvector, n numeric(12, 3), r int4range, addr inet,
    c text COLLATE "C", arr text[]);
INSERT INTO source
    SELECT g, g % 10, 'x' || g, 'v' || g % 5, date '2020-01-31' + g, timestamptz '2020-01-31 23:59:59.123456+05:30',
        jsonb_build_object('k', g), 'sad', 1, to_tsvector('simple', 'word ' || g), g / 7.0, int4range(g, g + 5),
        '10.0.0.1'::inet + g, 'c' || g, ARRAY['a', NULL, 'c' || g]
    FROM generate_series(1, 300) g;
GRANT SELECT ON source TO <owner>;
CREATE TABLE tree (id integer, parent integer);
INSERT INTO tree VALUES (1, NULL), (2, 1), (3, 2);
ALTER DEFAULT PRIVILEGES IN SCHEMA estate GRANT INSERT, DELETE ON TABLES TO <everyday>;

-- What anybody has.
CREATE MATERIALIZED VIEW plain AS SELECT id, a, b FROM source;
CREATE UNIQUE INDEX plain_key ON plain (id);
COMMENT ON MATERIALIZED VIEW plain IS E'line one\nline "two" /* not a comment */ -- nor this\t\\ \u2028 \u0001 $$ %s {}';

-- Names.
CREATE MATERIALIZED VIEW "Odd ""Näme.x" ("Id", "a b", "sel.ect", "über", "order")
    AS SELECT id, a, b, c AS "hidden", d FROM source;
CREATE INDEX "Odd.""index name" ON "Odd ""Näme.x" ("a b", "sel.ect" DESC, "order") INCLUDE ("Id", "über");
COMMENT ON COLUMN "Odd ""Näme.x"."sel.ect" IS 'it''s "a"';
COMMENT ON INDEX "Odd.""index name" IS 'odd';
CREATE MATERIALIZED VIEW "üüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüv" AS SELECT 1 AS "ccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc";
CREATE INDEX "iiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiiii" ON "üüüüüüüüüüüüüüüüüüüüüüüüüüüüüüüv"
    ("ccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc");
CREATE MATERIALIZED VIEW " leading and trailing " AS SELECT 1 AS " ";
CREATE INDEX ON " leading and trailing " (" ");
CREATE MATERIALIZED VIEW "PLAIN" AS SELECT 2 AS a;
CREATE MATERIALIZED VIEW "../up/and*/down" AS SELECT 3 AS "*/", '*/ /* -- ' AS "/*";
CREATE MATERIALIZED VIEW "select" AS SELECT 4 AS "from";
CREATE MATERIALIZED VIEW ".hidden" AS SELECT 4 AS a;
CREATE MATERIALIZED VIEW "new
line" AS SELECT 5 AS "tab	";

-- Queries.
CREATE MATERIALIZED VIEW q_values (x, "Y") AS VALUES (1, 'one'), (2, NULL);
CREATE MATERIALIZED VIEW q_values_as_it_is AS VALUES (1, 'one'), (2, 'two');
CREATE MATERIALIZED VIEW q_table AS TABLE source;
CREATE MATERIALIZED VIEW q_union ("first", second) AS
    SELECT id, b FROM source WHERE a = 1 UNION ALL (SELECT 1, 'x' EXCEPT SELECT a, b FROM source) ORDER BY 1 DESC NULLS LAST LIMIT 7;
CREATE MATERIALIZED VIEW q_recursive AS
    WITH RECURSIVE walk AS (SELECT id, parent, ARRAY[id] AS path FROM tree WHERE parent IS NULL
        UNION ALL SELECT t.id, t.parent, w.path || t.id FROM tree t JOIN walk w ON t.parent = w.id)
        SEARCH DEPTH FIRST BY id SET ordered CYCLE id SET looped USING way
    SELECT id, parent, path, looped FROM walk ORDER BY ordered;
CREATE MATERIALIZED VIEW q_nested AS
    WITH a AS MATERIALIZED (WITH b AS NOT MATERIALIZED (SELECT 1 AS x) SELECT * FROM b), "Source" AS (SELECT 2 AS x)
    SELECT a.x, s.x AS y FROM a, "Source" s;
CREATE MATERIALIZED VIEW q_empty AS SELECT id, b FROM source WHERE false;
CREATE MATERIALIZED VIEW q_no_columns AS SELECT FROM source;
CREATE MATERIALIZED VIEW q_never_filled AS SELECT id / 2 AS half FROM source WITH NO DATA;
CREATE INDEX ON q_never_filled (half);
CREATE MATERIALIZED VIEW q_in AS
    SELECT id FROM source WHERE "Select" IN ('v1', 'v2') AND "Select" <> ALL (ARRAY['v3'::varchar, 'v4']) AND m IN ('sad', 'HAPPY')
        AND b LIKE 'x%' AND "Select" NOT LIKE 'v\_%' AND "Select" = ANY ('{v1,v2}'::text[]);
CREATE MATERIALIZED VIEW q_constants AS
    SELECT 0.1::float8 AS f8, 1.1::float4 AS f4, 1e300 AS big, 'NaN'::float8 AS nan, '-infinity'::timestamptz AS never,
        date '2024-02-29' AS d, timestamp '1999-12-31 23:59:59.999999' AS ts, timestamptz '2024-07-01 12:00+02' AS tz,
        interval '-1 day +02:03:04.5' AS i, interval '14 months' AS months, time '24:00' AS t24, '\xdeadbeef'::bytea AS by,
        E'cr\r lf\n crlf\r\n tab\t back\\slash quote'' dollar $$ percent %s brace {} end */ start /* dash --' AS text,
        B'1010' AS bits, '{1,NULL,"a b"}'::text[] AS arr, '[1,5)'::int4range AS range, 'HAPPY'::mood AS mood,
        ROW(1, 'a', 2.5)::point3 AS composite, (ROW(1, 'a', 2.5)::point3)."Y" AS field, '{"a": [1, 2]}'::jsonb AS j,
        '10.0.0.0/8'::cidr AS net, NULL::positive AS nothing, U&'\00e9\+01F600' AS unicode, 1.50::numeric(6, 3) AS num;
CREATE MATERIALIZED VIEW q_everything AS
    SELECT s.id, row_number() OVER w AS rn, sum(s.n) FILTER (WHERE s.a > 3) OVER (w ROWS BETWEEN 1 PRECEDING AND CURRENT ROW EXCLUDE TIES) AS total,
        l.x, s.arr[2:3] AS slice, s.j -> 'k' AS k, s.j #>> '{k}' AS kk, s.c COLLATE backwards AS c, s.v @@ to_tsquery('simple', 'word') AS hit,
        s.a OPERATOR("Other Schema".===) 3 AS three, "Other Schema"."Odd Func"(s.a) AS odd, estate.lower(s.b) AS shadowed,
        pg_catalog.lower(s.b) AS real, s.t AT TIME ZONE 'Europe/Berlin' AS local, EXTRACT(year FROM s.d) AS y,
        CASE s.m WHEN 'sad' THEN 1 ELSE 2 END AS cased, COALESCE(s.a, 0) AS co, GREATEST(s.a, 1) AS gr, s.r && int4range(1, 3) AS over,
        (SELECT max(o.a) FROM source o WHERE o.id < s.id) AS sub, s.id IN (SELECT id FROM tree) AS ins, current_database() AS db
    FROM source AS s TABLESAMPLE bernoulli (100) REPEATABLE (1)
        LEFT JOIN LATERAL (SELECT x FROM unnest(s.arr) WITH ORDINALITY AS u (x, o) WHERE o = 1) l ON true
    WINDOW w AS (PARTITION BY s.a ORDER BY s.id DESC);
CREATE MATERIALIZED VIEW q_grouped AS
    SELECT a, m, count(*) AS n, percentile_cont(0.5) WITHIN GROUP (ORDER BY id) AS median, string_agg(DISTINCT b, ', ' ORDER BY b) AS bs,
        GROUPING(a, m) AS g
    FROM source GROUP BY GROUPING SETS ((a, m), ROLLUP (a), ()) HAVING count(*) > 1;
CREATE MATERIALIZED VIEW q_joined AS
    SELECT * FROM source s NATURAL JOIN (SELECT id, 1 AS one FROM tree) t CROSS JOIN LATERAL (SELECT s.id + 1 AS next) n
        FULL JOIN tree USING (id) ORDER BY s.a FETCH FIRST 3 ROWS WITH TIES;
CREATE MATERIALIZED VIEW q_catalog AS SELECT c.relname, c.relkind, n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid = 'pg_class'::regclass;

-- Indexes of every kind.
CREATE MATERIALIZED VIEW i_many AS SELECT * FROM source;
CREATE UNIQUE INDEX i_null ON i_many (a, id) NULLS NOT DISTINCT WITH (fillfactor = 70, deduplicate_items = off);
CREATE UNIQUE INDEX i_include ON i_many (id) INCLUDE (b, "Select");
CREATE INDEX i_order ON i_many (a DESC, b ASC NULLS FIRST, c DESC NULLS LAST, "Select" COLLATE "C" varchar_pattern_ops DESC);
CREATE INDEX i_partial ON i_many (b text_pattern_ops) WHERE a > 2 AND m IN ('sad', 'HAPPY') AND d >= date '2020-02-01';
CREATE INDEX i_expression ON i_many ((a + 1), lower(b), (b || 'x') COLLATE "C" DESC, (j ->> 'k'), "Other Schema"."Odd Func"(a));
CREATE INDEX i_collations ON i_many (b COLLATE backwards, c, c COLLATE "default", (c || b) COLLATE "Other Schema"."C again", upper(c));
CREATE INDEX i_odd_ops ON i_many (a "Other Schema"."Odd ops", (id * 2) "Other Schema"."Odd ops" DESC);
CREATE INDEX i_hash ON i_many USING hash (b) WITH (fillfactor = 60);
CREATE INDEX i_brin ON i_many USING brin (a, id int4_minmax_multi_ops (values_per_range = 16), b text_bloom_ops
    (n_distinct_per_range = -0.5, false_positive_rate = 0.05)) WITH (pages_per_range = 16, autosummarize = on);
CREATE INDEX i_gin ON i_many USING gin (j, arr) WITH (fastupdate = off, gin_pending_list_limit = 128);
CREATE INDEX i_gin_path ON i_many USING gin (j jsonb_path_ops);
CREATE INDEX i_gist ON i_many USING gist (v tsvector_ops (siglen = 100), r, addr inet_ops);
CREATE INDEX i_gist_include ON i_many USING gist (r) INCLUDE (id) WITH (buffering = off);
CREATE INDEX i_spgist ON i_many USING spgist (b) INCLUDE (a);
CREATE INDEX i_elsewhere ON i_many (n) TABLESPACE <tablespace>;
CREATE INDEX i_case ON i_many ((CASE WHEN a > 1 THEN 'x' ELSE b END), (a IS NULL), COALESCE(a, 0), (m = 'sad'));
ALTER INDEX i_expression ALTER COLUMN 1 SET STATISTICS 500;
ALTER INDEX i_expression ALTER COLUMN 4 SET STATISTICS 0;
ALTER INDEX i_brin DEPENDS ON EXTENSION plpgsql;
COMMENT ON INDEX i_gist IS 'about the index */';
ALTER MATERIALIZED VIEW i_many CLUSTER ON i_order;
ALTER MATERIALIZED VIEW i_many REPLICA IDENTITY FULL;
CREATE MATERIALIZED VIEW i_in AS SELECT id, "Select" FROM source;
CREATE INDEX i_in_partial ON i_in (id) WHERE "Select" IN ('v1', 'v2');
CREATE INDEX i_in_expression ON i_in (("Select" IN ('v1', 'v2')));
CREATE STATISTICS i_in_statistics ON ("Select" IN ('v1', 'v2')) FROM i_in;
CREATE MATERIALIZED VIEW i_collated AS SELECT id, b COLLATE backwards AS b, c COLLATE "Other Schema"."C again" AS c, b AS plain FROM source;
CREATE INDEX i_collated_own ON i_collated (b, c);
CREATE INDEX i_collated_other ON i_collated (b COLLATE "C", c COLLATE "default", plain COLLATE "POSIX", lower(plain), (b || c COLLATE "C"));

-- Everything else.
CREATE MATERIALIZED VIEW e_everything ("Id", a, "B b") USING heap_again
    WITH (fillfactor = 80, autovacuum_analyze_scale_factor = 0.02, autovacuum_enabled = false,
          toast.autovacuum_enabled = false, toast.autovacuum_vacuum_threshold = 9)
    TABLESPACE <tablespace> AS SELECT id, a, b FROM source;
CREATE UNIQUE INDEX "e key" ON e_everything ("Id");
CREATE INDEX e_a ON e_everything (a);
ALTER MATERIALIZED VIEW e_everything ALTER COLUMN a SET STATISTICS 77;
ALTER MATERIALIZED VIEW e_everything ALTER COLUMN "Id" SET STATISTICS 0;
ALTER MATERIALIZED VIEW e_everything ALTER COLUMN "B b" SET STORAGE EXTERNAL;
ALTER MATERIALIZED VIEW e_everything ALTER COLUMN "B b" SET COMPRESSION pglz;
ALTER MATERIALIZED VIEW e_everything ALTER COLUMN a SET (n_distinct = 5, n_distinct_inherited = -0.25);
COMMENT ON COLUMN e_everything.a IS 'it''s "a"';
COMMENT ON MATERIALIZED VIEW e_everything IS 'about % the view';
ALTER MATERIALIZED VIEW e_everything CLUSTER ON "e key";
ALTER MATERIALIZED VIEW e_everything REPLICA IDENTITY NOTHING;
ALTER MATERIALIZED VIEW e_everything DEPENDS ON EXTENSION plpgsql;
CREATE STATISTICS "stat S" (ndistinct, mcv) ON a, "B b" FROM e_everything;
CREATE STATISTICS "Other Schema".stat_expr ON (a + 1), "Id", lower("B b") FROM e_everything;
CREATE STATISTICS stat_alone ON (a * 2) FROM e_everything;
CREATE STATISTICS stat_all ON "Id", a FROM e_everything;
COMMENT ON STATISTICS "stat S" IS 'about the statistics';
ALTER STATISTICS "stat S" SET STATISTICS 33;
ALTER STATISTICS stat_alone SET STATISTICS 0;
ALTER STATISTICS "Other Schema".stat_expr OWNER TO <owner>;
ALTER MATERIALIZED VIEW e_everything OWNER TO <owner>;
REVOKE TRIGGER ON e_everything FROM <owner>;
GRANT SELECT ON e_everything TO <reader> WITH GRANT OPTION;
GRANT UPDATE (a), REFERENCES ("Id") ON e_everything TO <reader> WITH GRANT OPTION;
SET ROLE <reader>;
GRANT SELECT ON estate.e_everything TO <other>, PUBLIC;
GRANT SELECT ON estate.e_everything TO <owner>;
GRANT UPDATE (a) ON estate.e_everything TO <other>;
RESET ROLE;
GRANT SELECT, UPDATE ON e_everything TO <other> WITH GRANT OPTION;
GRANT SELECT ON e_everything TO PUBLIC;
GRANT ALL ON e_everything TO <Public>;
GRANT ALL ("B b") ON e_everything TO <Public>;
GRANT SELECT (a), INSERT (a) ON e_everything TO PUBLIC;
CREATE MATERIALIZED VIEW e_replica AS SELECT id, a FROM source;
CREATE UNIQUE INDEX e_replica_key ON e_replica (id);
CREATE MATERIALIZED VIEW e_owner_has_nothing AS SELECT id FROM source;
ALTER MATERIALIZED VIEW e_owner_has_nothing OWNER TO <owner>;
REVOKE ALL ON e_owner_has_nothing FROM <owner>;
CREATE MATERIALIZED VIEW e_maker_has_nothing AS SELECT id FROM source;
REVOKE ALL ON e_maker_has_nothing FROM CURRENT_USER;
CREATE MATERIALIZED VIEW e_owner_has_more AS SELECT id FROM source;
ALTER MATERIALIZED VIEW e_owner_has_more OWNER TO <owner>;
GRANT ALL ON e_owner_has_more TO <owner> WITH GRANT OPTION;
GRANT ALL ON e_owner_has_more TO <reader> WITH GRANT OPTION;

-- Views on views.
CREATE VIEW "between" AS SELECT id, a + 1 AS a FROM plain JOIN q_values_as_it_is ON id = column1;
CREATE VIEW between_again AS SELECT id, a, (SELECT count(*) FROM "select") AS n FROM "between";
CREATE MATERIALIZED VIEW a_top AS SELECT a, n FROM between_again WHERE id IN (SELECT id FROM e_replica);
CREATE INDEX ON a_top (a);
CREATE MATERIALIZED VIEW "Other Schema".far AS SELECT * FROM a_top;
CREATE FUNCTION counted() RETURNS bigint STABLE BEGIN ATOMIC SELECT count(*) FROM "Other Schema".far; END;
CREATE MATERIALIZED VIEW a_by_function AS SELECT counted() AS n;
CREATE MATERIALIZED VIEW a_by_type AS SELECT NULL::q_union AS u, NULL::"select"[] AS s;
