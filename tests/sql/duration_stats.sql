-- MatViewRun.joins(:mat_view_definition).where(status: :success).group("mat_view_definitions.name").pluck(...)
SELECT "mat_view_definitions"."name", AVG(duration_ms)::int, MIN(duration_ms), MAX(duration_ms), COUNT(*)
FROM "mat_view_runs"
INNER JOIN "mat_view_definitions" ON "mat_view_definitions"."id" = "mat_view_runs"."mat_view_definition_id"
WHERE "mat_view_runs"."status" = 2
GROUP BY "mat_view_definitions"."name"
