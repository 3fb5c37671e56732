-- MatViewRun.select("DISTINCT ON ...").where(status: :success).order("mat_view_definition_id, created_at DESC")
SELECT DISTINCT ON (mat_view_definition_id) mat_view_definition_id, meta->>'row_count_before' AS row_count_before, created_at
FROM "mat_view_runs"
WHERE "mat_view_runs"."status" = 2
ORDER BY mat_view_definition_id, created_at DESC
