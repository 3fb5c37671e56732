import time, json, traceback
import pytest
from airflow_provider_matviews.definition import *
from tests.conftest import Database, hook_on
from tests.conftest import *

def show(label, f):
    try:
        r = f(); print(label, '->', r)
    except BaseException as e:
        print(label, '-> ERR', type(e).__name__, str(e)[:400])

def test_x(each_db):
    t=time.time()
    h = hook_on(each_db)
    each_db.execute("create table t(v varchar(10), w char(3), a int)", "insert into t values ('a','b',1)")
    for i, s in enumerate(["select * from t where v in ('a','b')", "select * from t where v = 'a' and w in ('x','y')",
        "values (1,'a')", "table t", "select 'x'", "select now() - interval '1 day' as d", "select * from t with check option",
        "select a from t order by a limit 1", "select a::numeric(10,2) , coalesce(v,'x') from t", "select count(*) filter (where a > 1) from t",
        "select (t).* from t", "select t from t", "select * from t natural join t t2", "select extract(epoch from now())", "select * from t where v like any (array['a%'])",
        "select case v when 'a' then 1 end from t", "select * from t where (v, w) in (('a','b'))", "select v between 'a' and 'b' from t",
        "select a as \"A b\" from t", "select v collate \"C\" from t", "select a from t group by grouping sets ((a),())", "select a from t for update",
        "select * from generate_series(1,3) with ordinality as g(x,y)", "select 1 as a, 2 as a", "select v || 'x' from t where v not in ('q','r')",
        "select '{1,2}'::int[] = any(array['{1}'::int[]])", "select 1::\"char\" in ('a','b')", "select * from t where v is distinct from 'x'",
        "select  \t 1 -- hi", "select 1 /* hi */ ;", "select 1; -- x", "select 1;;", "; select 1", "select", "select 1 with no data", "select 1 with data",
        "select 1; select 2", "/* a */ -- b\n select 1", "select $1::int", "select * from t where v = $1", "explain select 1", "show all", "execute x", "-- just a comment", "select nonexistent from t", "select 1 from nonexist",
        "select 1 /* a", "select 'a", "select $q$a", "select \"a", "select 1 ) ; drop table t; --", "with x as (insert into t values ('q') returning *) select * from x", "insert into t values ('q') returning *",
        "select * into zz from t", "create temp table zz as select 1", "select * from pg_temp.zz", "call x()", "merge into t using t t2 on true when matched then delete returning 1", "delete from t returning *", "with a as (select 1) insert into t select 'a'", "copy t to stdout", "do $$begin end$$", "lock t", "declare c cursor for select 1", "fetch all from c",
        ]):
        d = MatViewDefinition(name=f"mv{i}", sql=s)
        show(s, lambda: h.create(d).status)
        show('   again', lambda: h.create(d).response.get('drift'))
    print(each_db.rows("select * from t"), each_db.rows("select relname from pg_class where relnamespace='public'::regnamespace and relname not like 'mv%'"))
    print(time.time()-t)
